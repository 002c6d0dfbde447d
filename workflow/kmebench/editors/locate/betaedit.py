"""BetaEdit (Liu et al. 2026, "BetaEdit: null-space constrained sequential model editing").

AlphaEdit's null space is not exact: the eigenvalues of C that it takes for zero are small. So
preserved keys are weighed in as well, and every so many edits the projection is made anew, of C and
of the keys of earlier edits: [P (K Kᵀ + K_p K_pᵀ + λ C) + α I] X = P K Rᵀ, Δ = Xᵀ.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.editors.locate.alphaedit import AlphaEdit, count_free
from kmebench.editors.locate.cards import BetaEditHparams
from kmebench.editors.locate.covariance.factors import Eigen, spectrum_of
from kmebench.editors.locate.updates import Factors, alphaedit_update
from kmebench.models.editable import EditableModel
from kmebench.precision import exact, exact_place


class Free(NamedTuple):
    """The directions that may be changed, and how much each is held there."""

    basis: Tensor  # [M, n], U
    held: Tensor  # [n], the diagonal of what of λC + K_p K_pᵀ is diagonal in U
    known: int  # keys of the edits that the projection was made of


class BetaEdit(AlphaEdit):
    """Preserved keys weighed in, and a projection that is refreshed."""

    hparams: BetaEditHparams
    _known: dict[int, int]  # layer -> keys that its projection was made of; 0: of C alone
    _free: dict[int, Free]  # layer -> its directions, of these keys

    def _update(
        self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor, earlier: Tensor
    ) -> Factors:
        if earlier.shape[1] - self._known.get(layer, 0) >= self.hparams.refresh_edits:
            self._known[layer] = earlier.shape[1]
        free, t = self._directions(model, layer, earlier), self._known.get(layer, 0)
        if t:  # 1 / t of these keys is held already
            earlier = torch.cat([(1 - 1 / t) ** 0.5 * earlier[:, :t], earlier[:, t:]], dim=1)
        ridge = self.hparams.ridge
        return alphaedit_update(residual, keys, earlier, free.basis, ridge, free.held)

    def _directions(self, model: EditableModel, layer: int, earlier: Tensor) -> Free:
        """Return the eigenvectors below the threshold, of C or of (λC + K_p K_pᵀ / t) / (λ + 1).

        They stay until t, the number of earlier keys that count, is another.
        """
        t, h = self._known.get(layer, 0), self.hparams
        if layer not in self._free or self._free[layer].known != t:
            place = exact_place(model.ffn[layer].value.weight.device)
            spectrum, scale = self.spectrum(model, layer).to(place), h.moment_weight
            if t:
                spectrum, scale = refreshed(spectrum, earlier[:, :t], scale), scale + 1
            n = count_free(spectrum.values, h.threshold, f"{self.name}: layer {layer}")
            held = scale * spectrum.values[:n]
            self._free[layer] = Free(spectrum.vectors[:n].T, held, t)
        return self._free[layer]

    def state_dict(self) -> dict[str, Tensor]:
        """Return contexts, keys, and how many of these each projection was made of."""
        known = {f"known.{layer}": torch.tensor(t) for layer, t in self._known.items()}
        return super().state_dict() | known

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` holds; an empty state forgets it."""
        super().load_state_dict(state)
        self._free = {}
        self._known = {
            int(name.removeprefix("known.")): int(t)
            for name, t in state.items()
            if name.startswith("known.")
        }


def refreshed(covariance: Eigen, keys: Tensor, weight: float) -> Eigen:
    """Return the spectrum of (λC + K Kᵀ / t) / (λ + 1) of that of C and t keys, [M, t]."""
    keys = exact(keys)
    dense = covariance.vectors.T @ (weight * covariance.values[:, None] * covariance.vectors)
    return spectrum_of((dense + keys @ keys.T / keys.shape[1]) / (weight + 1))
