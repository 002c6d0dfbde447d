"""Text memories: facts as text before questions (IKE, Zheng et al. 2023; SERAC).

A question is answered behind the context of one fact, or as it is: no bit changes then. In the
scope ``oracle`` every request is asked behind its own fact, as IKE was published. In the scope
``retrieved`` a question finds its fact itself: the one with the key of the largest cosine, if
that is at least the threshold. Whose question it is must not matter then, and is not looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from kmebench.edits.overlays import Overlay, Text
from kmebench.edits.sentences import SentenceEncoder
from kmebench.io.tensors import json_tensor, json_value

Scope = Literal["oracle", "retrieved"]


class Fact(NamedTuple):
    """One fact, and the text that stands before questions about it."""

    case_id: str
    prompt: str  # filled
    context: str


@dataclass(frozen=True)
class TextMemory(Overlay):
    """n facts with their keys, oldest first."""

    scope: Scope
    threshold: float  # of the cosine
    encoder: SentenceEncoder
    facts: tuple[Fact, ...] = ()
    keys: Tensor | None = None  # [n, D], of norm 1; None: no fact

    kind: ClassVar[str] = "text_memory"
    gated: ClassVar[bool] = True

    @property
    def settings(self) -> tuple[Scope, float, str]:
        """How facts are found: scope, threshold and the encoder's hash."""
        return self.scope, self.threshold, self.encoder.sha256

    def with_facts(self, facts: Sequence[Fact], keys: Tensor) -> Self:
        """Return a successor that holds further facts with their keys [m, D]."""
        held = [] if self.keys is None else [self.keys]
        return replace(self, facts=(*self.facts, *facts), keys=torch.cat([*held, keys]))

    def rewrite(self, texts: Sequence[Text]) -> Sequence[Text]:
        """Put contexts before the prompts that have one."""
        if self.keys is None or not texts:
            return texts
        oracle = self.scope == "oracle"
        found = self._own(texts) if oracle else self._nearest(texts, self.keys)
        return [
            text if fact is None else _behind(fact.context, text)
            for text, fact in zip(texts, found, strict=True)
        ]

    def _own(self, texts: Sequence[Text]) -> list[Fact | None]:
        by_case = {fact.case_id: fact for fact in self.facts}
        return [by_case.get(text.case_id) if text.case_id else None for text in texts]

    def _nearest(self, texts: Sequence[Text], keys: Tensor) -> list[Fact | None]:
        cosines = self.encoder.embed([text.prompt for text in texts]) @ keys.T  # [R, n]
        nearest = cosines.max(dim=1)
        # Keys of one prompt are equal, and which of them is found is up to rounding.
        latest = {fact.prompt: fact for fact in self.facts}
        return [
            latest[self.facts[place].prompt] if cosine >= self.threshold else None
            for cosine, place in zip(*map(Tensor.tolist, nearest), strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return the keys, and everything else as JSON in bytes; the encoder by its hash."""
        encoder = [part for part in astuple(self.encoder) if part]  # most are not tuned
        told = [self.scope, self.threshold, encoder, self.facts]
        keys = {} if self.keys is None else {"keys": self.keys}
        return {**keys, "facts": json_tensor(told)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a text memory; see :meth:`Overlay.from_tensors`."""
        scope, threshold, encoder, facts = json_value(tensors["facts"])
        keys = tensors["keys"] if facts else None
        if keys is not None and len(keys) != len(facts):
            raise ValueError("a text memory has one key per fact")
        held = tuple(Fact(*fact) for fact in facts)
        return cls(scope, threshold, SentenceEncoder(*encoder), held, keys)


def _behind(context: str, text: Text) -> Text:
    return text._replace(prompt=context + text.prompt, context=context)
