"""No edit: the floor that every editor has to beat."""

from collections.abc import Sequence

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.editors.control.cards import NoneHparams
from kmebench.edits.weights import WeightDelta
from kmebench.models.editable import EditableModel


class NoEdit(Editor):
    """Leaves the model as it is."""

    hparams: NoneHparams

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Return no change; see :meth:`Editor.edit`."""
        return WeightDelta({})
