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
from kmebench.editors.finetune.adapters import Factors, change
from kmebench.editors.finetune.adapting import AdapterEditor
from kmebench.editors.finetune.cards import LoRAHparams
from kmebench.edits.weights import WeightDelta
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded


class LoRA(AdapterEditor):
    """One adapter that every edit trains on, merged."""

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
        earlier, h = self._factors, self.hparams
        self._factors = self.trained(model, requests, earlier)
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
