"""A model's predictions on prompts: all that the metrics of every protocol need.

Per prompt: the teacher-forced argmax at the target's positions; the mean log-probability per
token of target_new and of the true answer; and, on request, greedy decoding to the gold
length and in the WILD manner (question-answer prompt, natural stop).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kmebench.edits.overlays import Passage, Text
from kmebench.evaluation.answers import has_stopped, natural_stop
from kmebench.evaluation.behind import by_context, without_gaps
from kmebench.evaluation.prompts import Prompt, wild_prompt
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks
from kmebench.models.prefixes import Prefix


@dataclass(frozen=True)
class Settings:
    """How predictions are made."""

    batch_size: int = 32  # prompts in one forward pass
    wild_max_tokens: int = 50


@torch.no_grad()
def predict(
    model: EditableModel, prompts: Sequence[Prompt], settings: Settings, *, decode: bool
) -> dict[str, list]:
    """Predict every prompt; ``decode`` adds greedy decoding (else None).

    Returns columns over the prompts: ``target_ids``, ``ids`` (lists of token ids),
    ``target_new_logprob``, ``target_true_logprob`` (nats per token; NaN without such a
    target), ``gate`` (whether an overlay acts on the question; None without a gate),
    ``free_ids``, ``wild``. Out of memory, it tries once more with half the batch.

    Raises:
        NoMemoryError: half the batch did not fit either.
    """
    return halved_if_needed(
        lambda size: _predict(model, prompts, replace(settings, batch_size=size), decode),
        settings.batch_size,
        "asking the model",
        "lower evaluation.batch_size, or choose a smaller dtype",
    )


def _predict(
    model: EditableModel, prompts: Sequence[Prompt], settings: Settings, decode: bool
) -> dict[str, list]:
    scored = [
        Text(p.prompt, target, p.case_id)
        for p in prompts
        for target in (p.target, p.target_new, p.target_true)
        if target is not None
    ]
    forced = _teacher_forced(model, sorted(set(scored)), settings.batch_size)
    nan = float("nan")

    def logprob(p: Prompt, target: str | None) -> float:
        return nan if target is None else forced[Text(p.prompt, target, p.case_id)].logprob

    told = [forced[Text(p.prompt, p.target, p.case_id)] for p in prompts]
    columns: dict[str, list] = {
        "target_ids": [list(answer.target_ids) for answer in told],
        "ids": [answer.ids for answer in told],
        "target_new_logprob": [logprob(p, p.target_new) for p in prompts],
        "target_true_logprob": [logprob(p, p.target_true) for p in prompts],
        "gate": [answer.opened if model.gated else None for answer in told],
        "free_ids": [None] * len(prompts),
        "wild": [None] * len(prompts),
    }
    if decode:
        columns["free_ids"] = _decode_free(model, prompts, told, settings)
        columns["wild"] = _decode_wild(model, prompts, settings)
    return columns


class _Forced(NamedTuple):
    """What the model says of a target that it is told token by token."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    ids: list[int]  # the likeliest token at each place of the target
    logprob: float  # of the target, nats per token
    opened: bool  # an overlay acts

    def is_greedy(self, prompt_ids: Sequence[int]) -> bool:
        """Whether ``ids`` is also what greedy decoding says after a prompt.

        It is if all that was told, the target without its last token, would have been said.
        """
        said = tuple(self.ids[:-1]) == self.target_ids[:-1]
        return said and self.prompt_ids == tuple(prompt_ids)


def _teacher_forced(
    model: EditableModel, texts: Sequence[Text], batch_size: int
) -> dict[Text, _Forced]:
    """Tell every target to the model; targets that differ in the last token alone, at once."""
    asked = model.rewritten(texts)
    # An overlay may put other words before a target, never another target.
    pairs = [(new.prompt, old.target or "") for new, old in zip(asked, texts, strict=True)]
    encoded = model.encode(pairs)
    prompts = [item.ids[: -item.n_target] for item in encoded]
    found = {}
    for prefix, rows in by_context(model, asked, prompts):
        told = _told(model, [encoded[i] for i in rows], prefix, batch_size)
        for index, (ids, logprob, opened) in zip(rows, told, strict=True):
            opened |= asked[index] is not texts[index]
            target = encoded[index].target_ids
            found[texts[index]] = _Forced(prompts[index], target, ids, logprob, opened)
    return found


def _told(
    model: EditableModel, encoded: Sequence[Encoded], prefix: Prefix | None, batch_size: int
) -> list[tuple[list[int], float, bool]]:
    """Return of texts behind a prefix the likeliest tokens, the target's log-probability, the gate.

    The gate is open if a hook or what changes logits says so.
    """
    shared = len(prefix.ids) if prefix else 0
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, item in enumerate(encoded):  # the last token is only predicted, never fed
        alike.setdefault((item.ids[shared:-1], item.n_target), []).append(index)
    groups = list(alike.values())
    found: dict[int, tuple[list[int], float, bool]] = {}
    for chunk in length_sorted_chunks([len(fed) for fed, _ in alike], batch_size):
        firsts = [encoded[groups[i][0]] for i in chunk]
        batch = model.collate([Encoded(item.ids[shared:], item.n_target) for item in firsts])
        passage = Passage(batch.prompt_last, batch.rows)
        log_probs = model.answer_logits(batch, prefix, passage).log_softmax(dim=-1)
        gates = [False] * len(chunk) if passage.opened is None else passage.opened.tolist()
        answers = log_probs.split(batch.counts.tolist())
        for group, rows, opened in zip(chunk, answers, gates, strict=True):
            ids = rows.argmax(dim=-1).tolist()
            for index in groups[group]:
                target = torch.tensor(encoded[index].target_ids, device=rows.device)
                found[index] = ids, float(rows.gather(1, target[:, None]).mean()), opened
    return [found[index] for index in range(len(encoded))]


def _decode_free(
    model: EditableModel, prompts: Sequence[Prompt], told: Sequence[_Forced], settings: Settings
) -> list[list[int]]:
    """Decode greedily, as many tokens as the target has, where teacher forcing leaves it open."""
    asked = model.rewritten([Text(p.prompt, case_id=p.case_id) for p in prompts])
    tokenised = model.encode_prompts([text.prompt for text in asked])
    decoded = [answer.ids for answer in told]
    lengths = [len(answer.ids) for answer in told]
    left = [i for i, answer in enumerate(told) if not answer.is_greedy(tokenised[i])]
    behind = by_context(model, [asked[i] for i in left], [tokenised[i] for i in left])
    for prefix, places in behind:
        rows = [left[i] for i in places]
        for chunk in length_sorted_chunks([lengths[i] for i in rows], settings.batch_size):
            chosen = [rows[i] for i in chunk]
            for group in _together(model, prefix, chosen, tokenised, lengths):
                longest = max(lengths[i] for i in group)
                said = model.generate([tokenised[i] for i in group], longest, prefix=prefix)
                for index, row in zip(group, said, strict=True):
                    decoded[index] = row[: lengths[index]].tolist()
    return decoded


def _together(
    model: EditableModel,
    prefix: Prefix | None,
    chunk: Sequence[int],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> list[list[int]]:
    """Split a chunk into rows that can be decoded together: they have room, and no gaps."""
    return [
        rows
        for alike in without_gaps(model, prefix, chunk, prompts)
        for rows in _with_room(alike, prompts, lengths, model.context)
    ]


def _with_room(
    chunk: Sequence[int],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    context: int | None,
) -> list[list[int]]:
    """Split a chunk whose rows all go on as long as its longest: what has no room goes alone."""
    longest = max(lengths[i] for i in chunk)
    roomy = [i for i in chunk if context is None or len(prompts[i]) + longest <= context]
    alone = [[i] for i in chunk if i not in roomy]
    return [roomy, *alone] if roomy else alone


def _decode_wild(model: EditableModel, prompts: Sequence[Prompt], settings: Settings) -> list[str]:
    """Decode answers to the question-answer prompt, cut at their natural stop."""
    asked = model.rewritten([Text(wild_prompt(p.prompt), case_id=p.case_id) for p in prompts])
    tokenised = model.encode_prompts([text.prompt for text in asked], room=settings.wild_max_tokens)
    decoded = [""] * len(prompts)
    for prefix, rows in by_context(model, asked, tokenised):
        lengths = [len(tokenised[i]) for i in rows]
        for chunk in length_sorted_chunks(lengths, settings.batch_size):
            chosen = [rows[i] for i in chunk]
            for group in without_gaps(model, prefix, chosen, tokenised):
                ids, targets = [tokenised[i] for i in group], [prompts[i].target for i in group]
                stop = _NaturalStop(model.tokenizer, targets, max(len(x) for x in ids))
                stopping = StoppingCriteriaList([stop])
                said = model.generate(ids, settings.wild_max_tokens, stopping, prefix)
                texts = model.tokenizer.batch_decode(said, skip_special_tokens=True)
                for index, text, target in zip(group, texts, targets, strict=True):
                    decoded[index] = natural_stop(text, target)
    return decoded


class _NaturalStop(StoppingCriteria):
    """Ends a row once its new text holds a natural stop that nothing said later can move."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], prompt_length: int
    ) -> None:
        self._tokenizer, self._targets = tokenizer, targets  # one target per row
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        new = input_ids[:, self._prompt_length :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        stopped = map(has_stopped, texts, self._targets)
        return torch.tensor(list(stopped), device=input_ids.device)
