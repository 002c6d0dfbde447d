"""SERAC without training (Mitchell et al. 2022, "Memory-based model editing at scale").

Edits are kept as text. A scope classifier decides whether a question falls under one of them: then
a counterfactual model answers from edit and question, else the model itself. Here both are
untrained: sentence embeddings are compared, and the model is its own counterfactual model.
"""

from collections.abc import Sequence

from kmebench.data.records import EditRequest
from kmebench.editors.memory.cards import SERACHparams
from kmebench.editors.memory.text_editor import TextEditor
from kmebench.edits.text_memory import TextMemory


class SERAC(TextEditor):
    """Facts as single lines before the questions in their scope."""

    hparams: SERACHparams

    def empty(self) -> TextMemory:
        """Return a memory without facts: s = (1 + cosine) / 2 is compared with the threshold."""
        return TextMemory("retrieved", 2 * self.hparams.threshold - 1, self.encoder)

    def key(self, request: EditRequest) -> str:
        """Return the edit, its answer too."""
        return f"{request.filled_prompt} {request.target_new}"

    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """Return each edit as a line."""
        return [f"{self.key(request)}\n" for request in requests]
