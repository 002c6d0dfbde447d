"""What editors share that keep facts as text: IKE and SERAC."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor
from kmebench.edits.edit import Edit
from kmebench.edits.sentences import SentenceEncoder
from kmebench.edits.text_memory import Fact, TextMemory
from kmebench.errors import EditError
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import encode_prompts

#: Tokens kept free behind a context, for a question and what is said to it.
ROOM = 128


class TextEditor(Editor):
    """Facts as text before questions; the model carries them from edit to edit."""

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> Edit:
        """Remember ``requests``; see :meth:`Editor.edit`. Weights never change."""
        memory = self._memory(model)
        with self.stopwatch("retrieve"):
            contexts = self.contexts(requests)
            keys = self.encoder.embed([self.key(request) for request in requests])
        facts = [
            Fact(request.case_id, request.filled_prompt, context)
            for request, context in zip(requests, contexts, strict=True)
        ]
        self._check_room(model, facts)
        return Edit(overlays={self.name: memory.with_facts(facts, keys)})

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """What embeds facts and questions."""
        return SentenceEncoder.open(self.assets["encoder"])

    @abstractmethod
    def empty(self) -> TextMemory:
        """Return a memory without facts."""

    @abstractmethod
    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """Return what stands before questions about each request."""

    @abstractmethod
    def key(self, request: EditRequest) -> str:
        """Return the text with which questions are compared."""

    def _memory(self, model: EditableModel) -> TextMemory:
        """Return the memory that the model carries, or an empty one."""
        carried, empty = model.edits.overlays.get(self.name), self.empty()
        if not isinstance(carried, TextMemory):
            return empty
        if carried.settings != empty.settings:
            raise EditError(
                f"{self.name}: the model carries a memory with the scope, threshold and encoder "
                f"{carried.settings}, and these values ask for {empty.settings}; edit with those "
                "values, or revert the model."
            )
        return carried

    def _check_room(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        """Refuse contexts behind which no question fits."""
        if model.context is None:
            return
        lengths = map(len, encode_prompts(model.tokenizer, [fact.context for fact in facts]))
        for fact, length in zip(facts, lengths, strict=True):
            if length + ROOM > model.context:
                raise EditError(
                    f"{self.name}: the context of the request {fact.case_id!r} has {length} "
                    f"tokens, and with the {ROOM} that are kept for a question more than "
                    f"{model.limit}; lower demonstrations."
                )
