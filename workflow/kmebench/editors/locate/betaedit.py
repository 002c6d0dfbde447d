"""BetaEdit (Liu et al. 2026, "BetaEdit: null-space constrained sequential model editing").

AlphaEdit's null space is not exact: the eigenvalues of C that it takes for zero are small. So
preserved keys are weighed in as well, and every so many edits the projection is made anew, of C and
of the keys of earlier edits: [P (K Kᵀ + K_p K_pᵀ + λ C) + α I] X = P K Rᵀ, Δ = Xᵀ.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kmebench.editors.locate.alphaedit import AlphaEdit, count_free
from kmebench.editors.locate.base import by_layer
from kmebench.editors.locate.cards import BetaEditHparams
from kmebench.editors.locate.covariance.factors import Eigen, spectrum_of
from kmebench.editors.locate.updates import Factors
from kmebench.models.editable import EditableModel
from kmebench.precision import exact, exact_place


class BetaEdit(AlphaEdit):
    """Preserved keys weighed in, and a projection that is refreshed."""

    hparams: BetaEditHparams
    _known: dict[int, int]  # layer -> keys that its projection was made of; 0: of C alone
    _weighed: dict[int, Tensor]  # layer -> its directions, each by how little it is held, [M, n]

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        edits = self._earlier[layer].shape[1] if layer in self._earlier else 0
        if edits - self._known.get(layer, 0) >= self.hparams.refresh_edits:
            self._known[layer] = edits
            self._weighed.pop(layer, None)
            self._kept.pop(layer, None)
        return super()._solve(model, layer, residual, keys)

    def _parts(self, layer: int) -> Sequence[Tensor]:
        """Return AlphaEdit's; first those that the projection was made of, 1 / t of it each."""
        t = self._known.get(layer, 0)
        if not t:
            return super()._parts(layer)
        earlier, calls = self._earlier[layer], self._calls[layer]
        later = calls[calls.cumsum(0) > t].tolist()
        return (1 - 1 / t) ** 0.5 * earlier[:, :t], *earlier[:, t:].split(later, dim=1)

    def _basis(self, model: EditableModel, layer: int) -> Tensor:
        """Return the eigenvectors below the threshold, of C or of (λC + K_p K_pᵀ / t) / (λ + 1).

        Each is weighed by how much of λC + K_p K_pᵀ it holds: see :func:`alphaedit_update`.
        """
        if layer not in self._weighed:
            t, h = self._known.get(layer, 0), self.hparams
            place = exact_place(model.ffn[layer].value.weight.device)
            spectrum, scale = self.spectrum(model, layer).to(place), h.moment_weight
            if t:
                spectrum = refreshed(spectrum, self._earlier[layer][:, :t], scale)
                scale += 1
            n = count_free(spectrum.values, h.threshold, f"{self.name}: layer {layer}")
            held = 1 + scale * spectrum.values[:n] / h.ridge
            self._weighed[layer] = spectrum.vectors[:n].T * held.rsqrt()
        return self._weighed[layer]

    def state_dict(self) -> dict[str, Tensor]:
        """Return contexts, keys, and how many of these each projection was made of."""
        known = {f"known.{layer}": torch.tensor(t) for layer, t in self._known.items()}
        return super().state_dict() | known

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` holds; an empty state forgets it."""
        super().load_state_dict(state)
        self._weighed = {}
        self._known = {layer: int(t) for layer, t in by_layer(state, "known.").items()}


def refreshed(covariance: Eigen, keys: Tensor, weight: float) -> Eigen:
    """Return the spectrum of (λC + K Kᵀ / t) / (λ + 1) of that of C and t keys, [M, t]."""
    keys = exact(keys)
    dense = covariance.vectors.T @ (weight * covariance.values[:, None] * covariance.vectors)
    return spectrum_of((dense + keys @ keys.T / keys.shape[1]) / (weight + 1))
