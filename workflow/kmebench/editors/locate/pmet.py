"""PMET (Li et al. 2024, "PMET: precise model editing in a transformer").

MEMIT with two unknowns, on the attention's output and on the FFN's output of the last edited layer;
only the FFN's part is written: the target is its output plus its δ, and the residual is spread over
the layers by the square root of those left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.locate.keys import module_outputs
from kmebench.editors.locate.memit import MEMIT, MEMITHparams
from kmebench.models.editable import EditableModel


@dataclass(frozen=True)
class PMETHparams(MEMITHparams):
    """Hyper-parameters of PMET."""

    steps: int = 20
    weight_decay: float = 0.5
    clamp_factor: float = 1.0


class PMET(MEMIT):
    """Targets of the FFN alone."""

    Hparams = PMETHparams
    name = "pmet"
    site = "attention-value"
    root = True

    def _current(self, model: EditableModel, requests: Sequence[EditRequest]) -> Tensor:
        module = model.ffn[self.hparams.layers[-1]].value.module
        return module_outputs(model, requests, module, self.hparams.micro_batch)
