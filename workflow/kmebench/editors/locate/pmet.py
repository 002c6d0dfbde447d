"""PMET (Li et al. 2024, "PMET: precise model editing in a transformer").

MEMIT with two unknowns, on the attention's output and on the FFN's output of the last edited layer;
only the FFN's part is written: the target is its output plus its δ, and the residual is spread over
the layers by the square root of those left.
"""

from collections.abc import Sequence

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.locate.keys import module_outputs
from kmebench.editors.locate.memit import MEMIT
from kmebench.models.editable import EditableModel


class PMET(MEMIT):
    """Targets of the FFN alone."""

    site = "attention-value"
    root = True

    def _current(self, model: EditableModel, requests: Sequence[EditRequest]) -> Tensor:
        module = model.ffn[self.hparams.layers[-1]].output
        return module_outputs(model, requests, module, self.micro_batch)
