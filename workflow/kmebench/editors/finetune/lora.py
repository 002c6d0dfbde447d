"""LoRA: low-rank adapters (Hu et al. 2022, "LoRA: low-rank adaptation of large language models").

    minimise L(y*) over A [r, in], B [out, r],   W = W0 + (alpha / r) B A

by Adam. Plain LoRA, where some toolkits run AdaLoRA under this name. The adapter is merged: an
edit is the change of its product. Along consecutive edits *one* adapter keeps training: A and B
are the editor's memory; Adam starts afresh with every call.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.finetune.adapters import Factors, adapters, change
from kmebench.editors.finetune.cards import LoRAHparams
from kmebench.editors.losses import check_finite, target_losses
from kmebench.edits.weights import WeightDelta
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks


class LoRA(Editor):
    """Adapters of attention, or of the FFN (GPT-J, GPT-2), merged."""

    hparams: LoRAHparams
    _factors: Factors

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`.

        After an earlier call the model must carry the deltas returned so far.

        Raises:
            EditError: it carries no edits at all.
        """
        if self._factors and not model.edits.state():
            raise EditError(
                f"{self.name}: the adapter has made edits that the model does not carry; apply "
                "every delta before the next call, or forget the adapter by load_state_dict({})."
            )
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        earlier, h = self._factors, self.hparams
        # Drawn on the CPU, whose generator is in checkpoints: a GPU's, used by dropout, is not.
        seed = int(torch.randint(2**62, ()))
        with self.stopwatch("optimise"), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            with adapters(model, h.rank, h.alpha, h.dropout, merged=earlier) as live:
                self._train(model, requests, encoded, [p for pair in live.values() for p in pair])
                self._factors = {
                    name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in live.items()
                }
        return change(model, earlier, self._factors, h.alpha / h.rank)

    def state_dict(self) -> dict[str, Tensor]:
        """Return A [r, in] and B [out, r] of every adapted module."""
        return {
            f"{name}|{letter}": factor
            for name, pair in self._factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the adapter; an empty state forgets it."""
        names = [key.removesuffix("|A") for key in state if key.endswith("|A")]
        self._factors = {name: (state[f"{name}|A"], state[f"{name}|B"]) for name in names}

    def _train(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        parameters: Sequence[Tensor],
    ) -> None:
        optimiser = torch.optim.Adam(parameters, lr=self.hparams.learning_rate, fused=True)
        for _ in range(self.hparams.steps):
            optimiser.zero_grad()
            if self._backward(model, requests, encoded) < self.hparams.tolerance:
                break
            optimiser.step()
            self.steps += 1

    def _backward(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
    ) -> float:
        """Accumulate the gradient of the mean loss; return the loss of the worst request."""
        worst = 0.0
        lengths = [len(item.ids) for item in encoded]
        for chunk in length_sorted_chunks(lengths, self.micro_batch):
            losses = target_losses(model, [encoded[i] for i in chunk])
            asked = [requests[i] for i in chunk]
            rate = self.hparams.learning_rate
            check_finite(self.name, losses.detach(), asked, self.steps, learning_rate=rate)
            worst = max(worst, float(losses.detach().max()))
            (losses.sum() / len(encoded)).backward()
        return worst
