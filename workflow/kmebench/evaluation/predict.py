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

from kmebench.edits.overlays import Text
from kmebench.evaluation.answers import has_stopped, natural_stop
from kmebench.evaluation.prompts import Prompt, wild_prompt
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Pair, length_sorted_chunks


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
    target), ``free_ids``, ``wild``. Out of memory, it tries once more with half the batch.

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
    pairs = {(p.prompt, p.target) for p in prompts}
    pairs |= {(p.prompt, p.target_new) for p in prompts if p.target_new is not None}
    pairs |= {(p.prompt, p.target_true) for p in prompts if p.target_true is not None}
    forced = _teacher_forced(model, sorted(pairs), settings.batch_size)
    nan = float("nan")

    def logprob(prompt: Prompt, target: str | None) -> float:
        return nan if target is None else forced[prompt.prompt, target].logprob

    told = [forced[p.prompt, p.target] for p in prompts]
    columns: dict[str, list] = {
        "target_ids": [list(answer.target_ids) for answer in told],
        "ids": [answer.ids for answer in told],
        "target_new_logprob": [logprob(p, p.target_new) for p in prompts],
        "target_true_logprob": [logprob(p, p.target_true) for p in prompts],
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

    def is_greedy(self, prompt_ids: Sequence[int]) -> bool:
        """Whether ``ids`` is also what greedy decoding says after a prompt.

        It is if all that was told, the target without its last token, would have been said.
        """
        said = tuple(self.ids[:-1]) == self.target_ids[:-1]
        return said and self.prompt_ids == tuple(prompt_ids)


def _teacher_forced(
    model: EditableModel, pairs: Sequence[Pair], batch_size: int
) -> dict[Pair, _Forced]:
    """Tell every target to the model; targets that differ in the last token alone, at once."""
    asked = model.rewritten([Text(*pair) for pair in pairs])
    # An overlay may put other words before a target, never another target.
    prompts = zip(asked, pairs, strict=True)
    encoded = model.encode([(text.prompt, target) for text, (_, target) in prompts])
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, item in enumerate(encoded):  # the last token is only predicted, never fed
        alike.setdefault((item.ids[:-1], item.n_target), []).append(index)
    groups = list(alike.values())
    found = {}
    for chunk in length_sorted_chunks([len(fed) for fed, _ in alike], batch_size):
        batch = model.collate([encoded[groups[i][0]] for i in chunk])
        log_probs = model.answer_logits(batch).log_softmax(dim=-1)
        for group, rows in zip(chunk, log_probs.split(batch.counts.tolist()), strict=True):
            ids = rows.argmax(dim=-1).tolist()
            for index in groups[group]:
                target = encoded[index].target_ids
                gold = rows.gather(1, torch.tensor(target, device=rows.device)[:, None])
                prompt = encoded[index].ids[: -len(target)]
                found[pairs[index]] = _Forced(prompt, target, ids, float(gold.mean()))
    return found


def _decode_free(
    model: EditableModel, prompts: Sequence[Prompt], told: Sequence[_Forced], settings: Settings
) -> list[list[int]]:
    """Decode greedily, as many tokens as the target has, where teacher forcing leaves it open."""
    asked = model.rewritten([Text(p.prompt) for p in prompts])
    tokenised = model.encode_prompts([text.prompt for text in asked])
    decoded = [answer.ids for answer in told]
    lengths = [len(answer.ids) for answer in told]
    left = [i for i, answer in enumerate(told) if not answer.is_greedy(tokenised[i])]
    for chunk in length_sorted_chunks([lengths[i] for i in left], settings.batch_size):
        rows = [left[i] for i in chunk]
        for group in _with_room(rows, tokenised, lengths, model.context):
            longest = max(lengths[i] for i in group)
            said = model.generate([tokenised[i] for i in group], longest)
            for index, row in zip(group, said, strict=True):
                decoded[index] = row[: lengths[index]].tolist()
    return decoded


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
    asked = model.rewritten([Text(wild_prompt(p.prompt)) for p in prompts])
    tokenised = model.encode_prompts([text.prompt for text in asked], room=settings.wild_max_tokens)
    decoded = [""] * len(prompts)
    for chunk in length_sorted_chunks([len(ids) for ids in tokenised], settings.batch_size):
        ids = [tokenised[i] for i in chunk]
        targets = [prompts[i].target for i in chunk]
        stop = _NaturalStop(model.tokenizer, targets, max(len(x) for x in ids))
        rows = model.generate(ids, settings.wild_max_tokens, StoppingCriteriaList([stop]))
        texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
        for index, text, target in zip(chunk, texts, targets, strict=True):
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
