"""MEMIT whose solve also holds what earlier edits of the run have written (MEMIT-seq).

Δ = R Kᵀ (λC + K_p K_pᵀ + K Kᵀ)⁻¹ with K_p the keys of earlier edits. With fixed keys and values in
one layer this is recursive least squares: however requests are split into calls, the weights are
those that one call makes of all of them (Wang et al. 2026).
"""

from collections.abc import Mapping

from torch import Tensor

from kmebench.editors.locate.base import by_layer
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import Factors, memit_update, with_keys
from kmebench.models.editable import EditableModel
from kmebench.precision import exact_place


class MEMITSeq(MEMIT):
    """MEMIT that remembers its keys."""

    _kept: dict[int, Tensor]  # layer -> (λC + K_p K_pᵀ)⁻¹, [M, M] float64

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        before = self._kept[layer] if layer in self._kept else self._start(model, layer)
        before = before.to(exact_place(keys.device))
        self._kept[layer] = with_keys(before, keys)
        return memit_update(residual, keys, before, 1.0)

    def _start(self, model: EditableModel, layer: int) -> Tensor:
        """Return the inverse of what a run preserves in a layer before its first edit."""
        return self.inverse(model, layer) / self.hparams.moment_weight

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contexts, and for each layer the inverse that holds K_p K_pᵀ."""
        kept = {f"kept.{layer}": inverse for layer, inverse in self._kept.items()}
        return super().state_dict() | kept

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore contexts and keys; an empty state forgets them."""
        super().load_state_dict(state)
        self._kept = by_layer(state, "kept.")
