"""R-ROME (Gupta et al. 2024, "Rebuilding ROME").

ROME with the same averaged key, and the same averaged output, on both sides of its update. ROME's
mixture of averaged and bare keys makes some edits so large that they disable a model.
"""

from kmebench.data.records import EditRequest
from kmebench.editors.locate.keys import Activations
from kmebench.editors.locate.rome import ROME
from kmebench.models.editable import EditableModel


class RROME(ROME):
    """ROME with the averaged key on both sides."""

    def _probe(
        self, model: EditableModel, request: EditRequest, averaged: Activations
    ) -> Activations:
        return averaged
