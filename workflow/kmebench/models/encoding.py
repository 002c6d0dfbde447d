"""Prompts and targets as token batches.

What a tokenizer puts before a text stays, what it appends (an end of text) does not: the text goes
on. The boundary between prompt and target is found from the tokenizer's offsets on the
concatenated text, so it is right for byte-level BPE and SentencePiece alike. Batches are
padded on the right; under causal attention no real position then sees padding, so no
attention mask is needed and positions are those of the unpadded text.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kmebench.data.records import SLOT, EditRequest, slot_of
from kmebench.errors import ModelError

Pair = tuple[str, str]  # (prompt, target)


class SubjectText(NamedTuple):
    """The text ``prefix + prompt``, the slot of the prompt filled, and perhaps a target."""

    prefix: str
    prompt: str  # a template
    subject: str
    target: str | None
    slot: int | None = None  # where in the prompt it begins; may be left out if there is one

    @classmethod
    def of(cls, request: EditRequest, prefix: str, target: str | None) -> "SubjectText":
        """Put the prompt of a request behind ``prefix``."""
        return cls(prefix, request.prompt, request.subject, target, request.slot)


@dataclass(frozen=True)
class Encoded:
    """Token ids of ``prompt + " " + target``; the last ``n_target`` of them are the target."""

    ids: tuple[int, ...]
    n_target: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        """Token ids of the target, with its leading blank."""
        return self.ids[len(self.ids) - self.n_target :]


@dataclass(frozen=True)
class EncodedSubject(Encoded):
    """The same with ``subject_last``, the index of the last token of the subject."""

    subject_last: int


@dataclass(frozen=True)
class Batch:
    """R encoded pairs, padded on the right to T tokens.

    The last token of a target is only predicted, never fed. ``rows`` and ``positions`` [A]
    point at the A positions whose next token is a target token ("answer positions"), row by row;
    ``labels`` [A] are those tokens.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor
    counts: Tensor  # [R] answer positions of each row
    prompt_last: Tensor  # [R] position of each prompt's last token

    def repeat(self, times: int) -> "Batch":
        """Stack the batch ``times`` times along its rows."""
        n_rows = self.input_ids.shape[0]
        rows = torch.cat([self.rows + n_rows * k for k in range(times)])
        return Batch(
            self.input_ids.repeat(times, 1),
            rows,
            self.positions.repeat(times),
            self.labels.repeat(times),
            self.counts.repeat(times),
            self.prompt_last.repeat(times),
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[tuple[int, ...]]:
    """Encode prompts for the model to go on.

    Raises:
        ModelError: the tokenizer gives no offsets, or a prompt has no token.
    """
    encoded = [ids for ids, _ in _tokens(tokenizer, prompts)]
    if not all(encoded):
        raise ModelError(f"The prompt {prompts[encoded.index(())]!r} has no token.")
    return encoded


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[list[int]]:
    """Encode a text, cut into pieces of at most ``length`` tokens that each begin as texts do."""
    (ids, _), *_ = _tokens(tokenizer, [text])
    first = put_before(tokenizer)
    width = length - len(first)
    return [[*first, *ids[start : start + width]] for start in range(len(first), len(ids), width)]


def put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before every text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Encoded]:
    """Encode prompts with their targets.

    Raises:
        ModelError: the tokenizer gives no offsets, or a target or its prompt has no token.
    """
    encoded = []
    tokens = _tokens(tokenizer, [joined(*pair) for pair in pairs])
    for (prompt, target), (ids, offsets) in zip(pairs, tokens, strict=True):
        encoded.append(Encoded(ids, _count_target(ids, offsets, prompt, target)))
    return encoded


def encode_subjects(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[SubjectText]
) -> list[EncodedSubject]:
    """Encode filled prompts, with ``subject_last`` from the offsets of the slot.

    The token that holds the last character of the subject counts, wherever else in the text the
    subject may stand.

    Raises:
        ModelError: the tokenizer gives no offsets, a prompt has no slot, no token holds the end
            of a subject, or a target or its prompt has no token; names prompt and subject.
    """
    filled = [_fill(text) for text in texts]
    whole = [
        prompt if text.target is None else joined(prompt, text.target)
        for text, (prompt, _) in zip(texts, filled, strict=True)
    ]
    encoded = []
    tokens = _tokens(tokenizer, whole)
    for text, (prompt, end), (ids, offsets) in zip(texts, filled, tokens, strict=True):
        n_target = 0 if text.target is None else _count_target(ids, offsets, prompt, text.target)
        holders = [i for i, (first, last) in enumerate(offsets) if first < end <= last]
        if not holders or holders[-1] >= len(ids) - n_target:
            raise ModelError(
                f"No token before the target holds the end of the subject {text.subject!r} in "
                f"the prompt {text.prompt!r}."
            )
        # A character may be spelled by several tokens (bytes): the last one has seen them all.
        encoded.append(EncodedSubject(ids, n_target, holders[-1]))
    return encoded


def _fill(text: SubjectText) -> tuple[str, int]:
    """Return prefix and filled prompt as one text, and where in it the subject ends."""
    try:
        slot = slot_of(text.prompt, text.slot)
    except ValueError as error:
        raise ModelError(f"The subject {text.subject!r} has no place: {error}.") from error
    until_subject = text.prefix + text.prompt[:slot] + text.subject
    return until_subject + text.prompt[slot + len(SLOT) :], len(until_subject)


def joined(prompt: str, target: str) -> str:
    """Join a target to its prompt."""
    return f"{prompt} {target}"


_Offsets = list[tuple[int, int]]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[tuple[int, ...], _Offsets]]:
    """Return ids and character spans of each text, up to its last token that is text."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets; "
            "use a model folder with a fast tokenizer (tokenizer.json)."
        )
    # Not verbose: whoever knows the model says what is too long for it.
    encodings = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    tokens = []
    for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True):
        n = _last_text_token(offsets) + 1
        tokens.append((tuple(ids[:n]), offsets[:n]))
    return tokens


def _count_target(ids: Sequence[int], offsets: _Offsets, prompt: str, target: str) -> int:
    # Special tokens have the empty span (0, 0) and never count as target.
    n_target = sum(end > len(prompt) for _, end in offsets)
    if n_target == 0 or n_target >= len(ids):
        raise ModelError(f"No token to predict {target!r} from after the prompt {prompt!r}.")
    return n_target


def _last_text_token(offsets: _Offsets) -> int:
    # Some tokenizers trim blanks off their spans, so that of a last blank is empty, but not (0, 0).
    return max((index for index, (_, end) in enumerate(offsets) if end > 0), default=-1)


def collate(encoded: Sequence[Encoded], pad_id: int, device: torch.device) -> Batch:
    """Pad R encoded pairs into one batch."""
    fed = [e.ids[:-1] if e.n_target else e.ids for e in encoded]
    input_ids = torch.full((len(encoded), max(map(len, fed))), pad_id, dtype=torch.long)
    rows, positions, labels = list[int](), list[int](), list[int]()
    for row, item in enumerate(encoded):
        input_ids[row, : len(fed[row])] = torch.tensor(fed[row])
        first = len(item.ids) - item.n_target - 1
        rows += [row] * item.n_target
        positions += range(first, first + item.n_target)
        labels += item.target_ids
    counts = [item.n_target for item in encoded]
    last = [len(item.ids) - item.n_target - 1 for item in encoded]
    parts = (torch.tensor(x, device=device) for x in (rows, positions, labels, counts, last))
    return Batch(input_ids.to(device), *parts)


#: Tokens whose arithmetic takes as long as what every pass costs whatever its size (above all
#: reading the weights); measured on two CPU cores, a GPU has more.
PASS_TOKENS = 48


def length_sorted_chunks(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield index lists of at most ``size`` items of similar length, the shortest first.

    The cut is the cheapest of all: every chunk costs its padded tokens and
    :data:`PASS_TOKENS` (dynamic programming over the sorted items).
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    cost, first = [0.0], [0]  # of the cheapest cut of the first n items; where its last begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        starts = range(max(0, end - size), end)
        totals = [cost[start] + PASS_TOKENS + (end - start) * longest for start in starts]
        cost.append(min(totals))
        first.append(starts[totals.index(cost[-1])])
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(first[cuts[-1]])
    for start, end in itertools.pairwise(reversed(cuts)):
        yield order[start:end]
