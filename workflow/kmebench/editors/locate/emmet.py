"""EMMET (Gupta et al. 2024, "A unified framework for model editing").

MEMIT with equality constraints: minimise tr(Δ C0 Δᵀ) subject to (W + Δ) K = W K + R, so
Δ = R (Kᵀ C0⁻¹ K + ε I)⁻¹ Kᵀ C0⁻¹ with C0 = λC. ε = 0 is exact. The authors' code adds ε = 0.1 for
two or more requests, whose keys may be nearly dependent; together with a large λ it damps strongly.
"""

from dataclasses import dataclass

from torch import Tensor

from kmebench.editors.locate.memit import MEMIT, MEMITHparams
from kmebench.editors.locate.updates import Factors, emmet_update
from kmebench.models.editable import EditableModel


@dataclass(frozen=True)
class EMMETHparams(MEMITHparams):
    """Hyper-parameters of EMMET."""

    layers: tuple[int, ...] = (5,)
    moment_weight: float = 100_000.0
    epsilon: float = 0.1  # ε for two or more requests, as released; 0 is exact
    epsilon_single: bool = False  # ε for one request too, as one public toolkit has it


class EMMET(MEMIT):
    """Equality constraints instead of least squares."""

    Hparams = EMMETHparams
    name = "emmet"

    def _solve(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Factors:
        factor = self.factor(model, layer, self.hparams.moment_weight)
        damped = keys.shape[1] > 1 or self.hparams.epsilon_single
        return emmet_update(residual, keys, factor, self.hparams.epsilon if damped else 0.0)
