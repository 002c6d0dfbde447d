"""ENCORE (Gupta et al. 2025, "Lifelong knowledge editing requires better regularization").

MEMIT-seq with two restraints. The optimisation of a target ends soon after the target is what the
model says: over-fitted values are what makes weights grow. And a ridge holds the norm of the total
change: Δ = R Kᵀ (λC + λ_n I + K_p K_pᵀ + K Kᵀ)⁻¹.
"""

from torch import Tensor

from kmebench.editors.locate.cards import ENCOREHparams
from kmebench.editors.locate.covariance.factors import damped_inverse
from kmebench.editors.locate.memit_seq import MEMITSeq
from kmebench.models.editable import EditableModel
from kmebench.precision import exact_place


class ENCORE(MEMITSeq):
    """Early stop and norm constraint."""

    hparams: ENCOREHparams

    def _start(self, model: EditableModel, layer: int) -> Tensor:
        h = self.hparams
        if not h.norm_weight:
            return super()._start(model, layer)
        place = exact_place(model.ffn[layer].value.weight.device)
        return damped_inverse(self.spectrum(model, layer).to(place), h.moment_weight, h.norm_weight)
