"""The released schedule as the released code does it: whole gradients, masks, one dense Adam."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.cards import Card, card_of
from kmebench.editors.pac.zscore import abs_zscore
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.models.editable import EditableModel


class DenseReleased(Editor):
    """What :class:`kmebench.editors.pac.released.PACReleased` must equal, and beat."""

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        hparams = self.hparams
        projections = [p for ffn in model.ffn for p in (ffn.key, ffn.value)]
        weights = {p.weight_name: p.weight.requires_grad_() for p in projections}
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        adam = torch.optim.Adam(weights.values(), lr=hparams.learning_rate, fused=True)
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        size = hparams.mini_batch
        batches = [model.collate(encoded[i : i + size]) for i in range(0, len(encoded), size)]
        answers = [
            x
            for batch in batches
            for x in model.answer_logits(batch).argmax(-1).split(batch.counts.tolist())
        ]
        masks: dict[str, list[torch.Tensor]] = {}

        def backward(batch, labels, weight):
            with torch.enable_grad():
                (weight * cross_entropy(model.answer_logits(batch), labels)).backward()

        for epoch in range(hparams.epochs):
            if epoch % hparams.rescore_every == 0:
                adam.zero_grad()
                for batch in batches:
                    backward(batch, batch.labels, 1.0)
                for p in projections:
                    order = abs_zscore(p.weight.grad.movedim(p.axis, 1)).argsort(descending=True)
                    masks[p.weight_name] = []
                    for chosen in (order[: hparams.paths], order[-hparams.negatives :]):
                        mask = torch.zeros_like(p.weight)
                        mask.movedim(p.axis, 0)[chosen] = 1
                        masks[p.weight_name].append(mask)
            for chunk in torch.randperm(len(requests)).split(size):
                batch = model.collate([encoded[i] for i in chunk])
                own = torch.cat([answers[i] for i in chunk])
                for kind, (labels, weight) in enumerate(
                    ((batch.labels, 1.0), (own, hparams.contrast))
                ):
                    adam.zero_grad()
                    backward(batch, labels, weight)
                    for name, parameter in weights.items():
                        parameter.grad *= masks[name][kind]
                    adam.step()
                    self.steps += 1
        delta = WeightDelta({n: Dense(w.detach() - start[n]) for n, w in weights.items()})
        for name, weight in weights.items():
            weight.requires_grad_(False).copy_(start[name])
            weight.grad = None
        return delta


_OURS = card_of("pac-released")
CARD = Card(
    "pac-released-dense", "dense_released:DenseReleased", _OURS.hparams, "pac", _OURS.citation
)
