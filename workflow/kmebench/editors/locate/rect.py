"""RECT (Gu et al. 2024, "Model editing harms general abilities of large language models").

MEMIT, of whose change of every weight only the entries with the largest relative change are kept:
once, after all layers have been solved, so that no later layer makes up for what was dropped.
"""

from collections.abc import Sequence

from kmebench.data.records import EditRequest
from kmebench.editors.locate.cards import RECTHparams
from kmebench.editors.locate.memit import MEMIT
from kmebench.editors.locate.updates import largest_relative
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.models.editable import EditableModel


class RECT(MEMIT):
    """The largest relative changes alone."""

    hparams: RECTHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        kept = {}
        for name, part in super().edit(model, requests).items():
            weight = model.parameter(name).detach()
            delta = part.dense(weight.shape)
            kept[name] = Dense(largest_relative(delta, weight.to(delta), self.hparams.share))
        return WeightDelta(kept)
