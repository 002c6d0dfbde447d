"""RECT (Gu et al. 2024, "Model editing harms general abilities of large language models").

MEMIT, of whose change of every weight only the entries with the largest relative change are kept.
"""

from dataclasses import dataclass

from torch import Tensor

from kmebench.editors.memit import MEMIT, MEMITHparams
from kmebench.editors.updates import largest_relative
from kmebench.models.editable import EditableModel
from kmebench.weights.delta import Dense, Part


@dataclass(frozen=True)
class RECTHparams(MEMITHparams):
    """Hyper-parameters of RECT."""

    share: float = 0.4  # of the entries of a weight, that are kept


class RECT(MEMIT):
    """The largest relative changes alone."""

    Hparams = RECTHparams
    name = "rect"

    def _part(self, model: EditableModel, layer: int, residual: Tensor, keys: Tensor) -> Part:
        part = super()._part(model, layer, residual, keys)
        weight = model.parameter(model.ffn[layer].value.weight_name).detach()
        delta = part.dense(weight.shape)
        return Dense(largest_relative(delta, weight.to(delta), self.hparams.share))
