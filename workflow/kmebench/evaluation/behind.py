"""Questions behind the same context: the context is read once, not once for each."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from kmebench.edits.overlays import Text
from kmebench.models.editable import EditableModel
from kmebench.models.prefixes import Prefix


def by_context(
    model: EditableModel, asked: Sequence[Text], prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[Prefix | None, list[int]]]:
    """Yield rows that are asked together, and the prefix that all of them begin with.

    ``prompts`` are the token ids of ``asked``, without targets. Where an overlay acts inside the
    model, and behind a context of its own, a question is asked with all of its text (None).
    """
    counts = Counter(text.context for text in asked)
    several = {context for context, count in counts.items() if context and count > 1}
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(asked):
        shared = model.shares_prefixes and text.context in several
        groups.setdefault(text.context if shared else "", []).append(row)
    for context, rows in groups.items():
        ids = _begin([prompts[row] for row in rows]) if context else ()
        yield (model.read(ids) if ids else None), rows


def _begin(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the token ids that all prompts begin with, all but the last token of each at most.

    They are found among tokens and not in the text: a tokenizer may join the end of a context and
    the begin of a question to one token.
    """
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what both share, all share
    both = zip(first, last, strict=False)
    alike = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    return tuple(alike[: min(map(len, prompts)) - 1])


def without_gaps(
    model: EditableModel,
    prefix: Prefix | None,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Split rows by the length of their prompts, where padding behind a prefix would count.

    That is where attention has a window.
    """
    if prefix is None or not any(model.windows):
        return [list(rows)]
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(len(prompts[row]), []).append(row)
    return list(groups.values())
