"""Full-C: constrained fine-tuning (Zhu et al. 2021, "Modifying memories in transformer models").

    minimise L(y*) over the FFN weights W   subject to   ‖W − W0‖∞ ≤ δ

by Adam, projecting onto the constraint after every step. W0 are the weights before any edit,
so along consecutive edits the model stays inside one box around the original.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.epochs import EpochEditor, adam_state, load_adam_state
from kmebench.editors.finetune.cards import FullCHparams
from kmebench.editors.losses import check_finite, target_losses
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.errors import ConfigError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.models.layouts import Projection


class FullC(EpochEditor):
    """Fine-tuning inside a box around the original weights."""

    hparams: FullCHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        trained = {each.weight_name: each for each in self._projections(model)}
        start = {name: model.edits.master(name) for name in trained}
        try:
            tuned = self._tune(model, requests, encoded, trained, start)
            return WeightDelta({name: Dense(tuned[name] - start[name]) for name in trained})
        finally:
            for name, projection in trained.items():
                parameter = projection.weight.requires_grad_(False)
                parameter.grad = None
                parameter.copy_(start[name])  # the live weight is the rounded master

    def _projections(self, model: EditableModel) -> list[Projection]:
        layers = range(model.n_layers) if self.hparams.layers is None else self.hparams.layers
        if any(not 0 <= layer < model.n_layers for layer in layers):
            raise ConfigError(
                f"{self.name}: layers {list(layers)} are not all among the model's "
                f"0 to {model.n_layers - 1}."
            )
        ffns = [model.ffn[layer] for layer in layers]
        keys = [ffn.key for ffn in ffns] if self.hparams.projections == "both" else []
        return keys + [ffn.value for ffn in ffns]

    def _tune(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        trained: dict[str, Projection],
        start: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the tuned masters; in float32 they are the live weights themselves."""
        live = {name: each.weight.requires_grad_() for name, each in trained.items()}
        masters = {
            name: p.detach() if p.dtype == start[name].dtype else start[name].clone()
            for name, p in live.items()
        }
        optimiser = torch.optim.Adam(masters.values(), lr=self.hparams.learning_rate, fused=True)
        originals = self._originals(model, start)
        done, state = self.resumed()
        load_adam_state(optimiser, "adam", state)
        for name, master in masters.items() if state else ():
            master.copy_(state[name])
            live[name].detach().copy_(master)
        for epoch in range(done, self.hparams.steps):
            before = self.steps
            with self.stopwatch("optimise"):
                for group in self._groups(len(requests)):
                    if self._backward(model, requests, encoded, group):
                        for parameter in live.values():
                            parameter.grad = None
                        continue
                    self._step(optimiser, trained, masters, originals)
            if self.steps == before:
                break
            self.keep(epoch + 1, lambda: masters | adam_state(optimiser, "adam"))
        return masters

    def _originals(self, model: EditableModel, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return W0, if it bounds the weights: what no edit has touched starts from it."""
        if self.hparams.norm_constraint is None:
            return {}
        touched = model.edits.touched
        return {n: model.edits.original(n) if n in touched else w for n, w in start.items()}

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        trained: dict[str, Projection],
        masters: dict[str, Tensor],
        originals: dict[str, Tensor],
    ) -> None:
        """Move the masters by the gradients of the live weights, which follow them."""
        for name, master in masters.items():
            live = trained[name].weight
            master.grad = live.grad.to(master.dtype)
            master.grad.narrow(trained[name].axis, 0, trained[name].offset).zero_()  # a gate's
            live.grad = None
        optimiser.step()
        self._project(masters, originals)
        for name, master in masters.items():
            master.grad = None
            trained[name].weight.detach().copy_(master)
        self.steps += 1

    def _groups(self, n_requests: int) -> Sequence[Sequence[int]]:
        """Split the requests into those of one step each."""
        if self.hparams.mini_batch is None:
            return [range(n_requests)]
        return [g.tolist() for g in torch.randperm(n_requests).split(self.hparams.mini_batch)]

    def _backward(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        group: Sequence[int],
    ) -> bool:
        """Accumulate the gradient of the group's mean loss; true if all of it is learnt."""
        worst = 0.0
        lengths = [len(encoded[i].ids) for i in group]
        chunks = [
            [group[i] for i in chunk] for chunk in length_sorted_chunks(lengths, self.micro_batch)
        ]
        for chunk in chunks:
            losses = target_losses(model, [encoded[i] for i in chunk])
            asked = [requests[i] for i in chunk]
            rate = self.hparams.learning_rate
            check_finite(self.name, losses.detach(), asked, self.steps, learning_rate=rate)
            worst = max(worst, float(losses.detach().max()))
            if chunk is chunks[-1] and worst < self.hparams.tolerance:
                return True
            (losses.sum() / len(group)).backward()
        return False

    def _project(self, masters: dict[str, Tensor], originals: dict[str, Tensor]) -> None:
        """Clamp every master into the box around the original weight."""
        bound = self.hparams.norm_constraint
        for name, original in originals.items():
            center = original.to(masters[name].dtype)
            masters[name].clamp_(min=center - bound, max=center + bound)
