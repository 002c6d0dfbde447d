"""EMMET (Gupta et al. 2024, "A unified framework for model editing").

MEMIT with equality constraints: minimise tr(Δ C0 Δᵀ) subject to (W + Δ) K = W K + R, so
Δ = R (Kᵀ C0⁻¹ K + ε I)⁻¹ Kᵀ C0⁻¹ with C0 = λC. ε = 0 is exact. The authors' code adds ε = 0.1 for
two or more requests, whose keys may be nearly dependent; together with a large λ it damps strongly.
"""

from torch import Tensor

from kmebench.editors.locate.cards import EMMETHparams
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import Factors, emmet_update
from kmebench.models.editable import EditableModel


class EMMET(MEMIT):
    """Equality constraints instead of least squares."""

    hparams: EMMETHparams

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        damped = keys.shape[1] > 1 or self.hparams.epsilon_single
        epsilon = self.hparams.epsilon if damped else 0.0
        inverse = self.inverse(model, layer)
        return emmet_update(residual, keys, inverse, self.hparams.moment_weight, epsilon)
