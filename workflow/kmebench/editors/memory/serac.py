"""SERAC (Mitchell et al. 2022, "Memory-based model editing at scale").

Edits are kept as text. A scope classifier decides whether a question falls under one of them: then
a counterfactual model answers from edit and question, else the model itself. The classifier
compares sentence embeddings, as they are or fine-tuned. The model is its own counterfactual model:
the smallest of a family has no smaller one.
"""

import math
from collections.abc import Sequence
from functools import cached_property

from kmebench.data.records import EditRequest
from kmebench.editors.memory.cards import SERACHparams
from kmebench.editors.memory.scope import told
from kmebench.editors.memory.text_editor import TextEditor
from kmebench.edits.sentences import SentenceEncoder
from kmebench.edits.text_memory import TextMemory


class SERAC(TextEditor):
    """Facts as single lines before the questions in their scope."""

    hparams: SERACHparams

    def empty(self) -> TextMemory:
        """Return a memory without facts, by the cosine at which s is the threshold.

        Of embeddings of norm 1, ‖a − b‖² = 2 − 2 cosine.
        """
        least = self.hparams.least
        if self.hparams.classifier == "untrained":  # s = (1 + cosine) / 2
            return TextMemory("retrieved", 2 * least - 1, self.encoder)
        cosine = 1 + math.log(least) / 2 if least else -math.inf  # s = exp(2 cosine − 2)
        return TextMemory("retrieved", cosine, self.encoder)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The classifier's; see :attr:`TextEditor.encoder`."""
        tuned = self.assets["trained"] if self.hparams.classifier == "trained" else ""
        return SentenceEncoder.open(self.assets["encoder"], tuned)

    def key(self, request: EditRequest) -> str:
        """Return the edit, its answer too."""
        return told(request)

    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """Return each edit as a line."""
        return [f"{told(request)}\n" for request in requests]
