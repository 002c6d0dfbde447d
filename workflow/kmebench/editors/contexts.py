"""Texts that stand before the prompt of an edit while its key and target are computed.

An edit should hold whatever was said before it, so the editors of ROME's family average over the
bare prompt and over prompts that follow texts of the *unedited* model (Meng et al. 2022, section
3.1 and appendix E.5). An editor samples them before its first edit and keeps them as state.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kmebench.data.records import SLOT
from kmebench.editors.base import Editor
from kmebench.io.tensors import json_tensor, json_value
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, SubjectText

#: Groups of templates that end in the slot of the prompt; the first group is the bare prompt.
Contexts = tuple[tuple[str, ...], ...]

#: (tokens of a text, number of texts) of each group; as released, its first word counts.
ROME_LENGTHS = ((5, 10), (10, 10))
MEMIT_LENGTHS = ((10, 5),)

#: Common words that texts begin with, in turn.
STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5

_STATE_KEY = "contexts"


def sample_contexts(
    model: EditableModel, lengths: Sequence[tuple[int, int]], seed: int
) -> Contexts:
    """Sample texts by top-k sampling, k = 5.

    ``lengths`` gives (tokens, texts) of each group: every text is one of :data:`STARTS` and sampled
    tokens, so many in all. The generator is its own; the global one is left alone. Returns
    ``(("{}",), ("The text. {}", ...), ...)``.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [
        tuple(f"{text}. {SLOT}" for text in _sample_texts(model, n_tokens, n_texts, generator))
        for n_tokens, n_texts in lengths
    ]
    return ((SLOT,), *groups)


@torch.no_grad()
def _sample_texts(
    model: EditableModel, n_tokens: int, n_texts: int, generator: torch.Generator
) -> Iterator[str]:
    starts = [STARTS[i % len(STARTS)] for i in range(n_texts)]
    encoded = model.encode_subjects([SubjectText("", SLOT, start, None) for start in starts])
    rows = [item.ids for item in encoded]
    while short := [i for i, row in enumerate(rows) if len(row) < n_tokens]:
        # The padding stands for the token to predict; causal attention keeps it from being read.
        batch = model.collate([Encoded((*rows[i], model.pad_id), n_target=1) for i in short])
        best = model.answer_logits(batch).cpu().topk(TOP_K)
        choice = best.values.softmax(dim=-1).multinomial(1, generator=generator)
        for i, token in zip(short, best.indices.gather(1, choice).flatten().tolist(), strict=True):
            rows[i] = (*rows[i], token)
    for row in rows:
        yield model.tokenizer.decode(
            row, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def prefixes(contexts: Contexts) -> list[str]:
    """Return the texts before the slots, group by group.

    Templates are never formatted: sampled texts may hold braces of their own.
    """
    templates = [template for group in contexts for template in group]
    if not templates or templates[0] != SLOT or not all(t.endswith(SLOT) for t in templates):
        raise ValueError(f"contexts must begin with {SLOT!r} and all end in it: {templates!r}")
    return [template.removesuffix(SLOT) for template in templates]


def contexts_state(contexts: Contexts) -> dict[str, Tensor]:
    """Pack contexts for ``Editor.state_dict``: JSON as UTF-8 bytes, uint8."""
    return {_STATE_KEY: json_tensor(contexts)}


def contexts_from_state(state: Mapping[str, Tensor]) -> Contexts | None:
    """Unpack :func:`contexts_state`; none from a state without contexts."""
    if _STATE_KEY not in state:
        return None
    groups = json_value(state[_STATE_KEY])
    return tuple(tuple(group) for group in groups)


class InContexts(Editor):
    """An editor that remembers the contexts sampled from the original model."""

    #: (tokens of a text, number of texts) of each group of contexts.
    lengths: tuple[tuple[int, int], ...]
    _contexts: Contexts | None

    def contexts(self, model: EditableModel) -> Contexts:
        """Return the contexts; the first call samples them."""
        if self._contexts is None:
            self._contexts = sample_contexts(model, self.lengths, seed=0)
        return self._contexts

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contexts."""
        return {} if self._contexts is None else contexts_state(self._contexts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the contexts; an empty state forgets them."""
        self._contexts = contexts_from_state(state)
