"""PRUNE (Ma et al. 2025, "Perturbation-restrained sequential model editing").

MEMIT, and at the end of a run the singular values of each weight's total change are restrained
where they exceed the largest one of the original weight.
"""

import torch

from kmebench.editors.changes import low_rank
from kmebench.editors.locate.cards import PRUNEHparams
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import restraint
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel
from kmebench.precision import exact


class PRUNE(MEMIT):
    """MEMIT with a restrained sum."""

    hparams: PRUNEHparams

    def final_edit(self, model: EditableModel) -> WeightDelta:
        """Return what restrains the sum of all edits; see :meth:`Editor.final_edit`."""
        total = model.edits.total().weights
        restrained = WeightDelta({})
        for layer in self.hparams.layers:
            value = model.ffn[layer].value
            if value.weight_name not in total:  # no edit could be made
                continue
            original = exact(model.edits.original(value.weight_name))
            largest = float(torch.linalg.matrix_norm(original, ord=2))
            delta = total[value.weight_name].dense(original.shape)
            delta = delta if value.axis == 1 else delta.T  # [D, M]
            factors = restraint(delta, largest, self.hparams.base)
            restrained += low_rank(value, factors)
        return restrained
