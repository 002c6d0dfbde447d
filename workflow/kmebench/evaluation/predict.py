"""A model's predictions on prompts: all that the metrics of every protocol need.

Per prompt: the teacher-forced argmax at the target's positions; the mean log-probability per
token of target_new and of the true answer; and, on request, greedy decoding to the gold
length and in the WILD manner (question-answer prompt, natural stop).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        return nan if target is None else forced[prompt.prompt, target][2]

    columns: dict[str, list] = {
        "target_ids": [forced[p.prompt, p.target][0] for p in prompts],
        "ids": [forced[p.prompt, p.target][1] for p in prompts],
        "target_new_logprob": [logprob(p, p.target_new) for p in prompts],
        "target_true_logprob": [logprob(p, p.target_true) for p in prompts],
        "free_ids": [None] * len(prompts),
        "wild": [None] * len(prompts),
    }
    if decode:
        lengths = [len(ids) for ids in columns["target_ids"]]
        columns["free_ids"] = _decode_free(model, prompts, lengths, settings)
        columns["wild"] = _decode_wild(model, prompts, settings)
    return columns


def _teacher_forced(
    model: EditableModel, pairs: Sequence[Pair], batch_size: int
) -> dict[Pair, tuple[list[int], list[int], float]]:
    """Return target ids, argmax ids and mean log-probability of the target, for every pair."""
    asked = model.rewritten([Text(*pair) for pair in pairs])
    # An overlay may put other words before a target, never another target.
    prompts = zip(asked, pairs, strict=True)
    encoded = model.encode([(text.prompt, target) for text, (_, target) in prompts])
    found = {}
    for chunk in length_sorted_chunks([len(e.ids) for e in encoded], batch_size):
        batch = model.collate([encoded[i] for i in chunk])
        log_probs = model.answer_logits(batch).log_softmax(dim=-1)
        gold = log_probs.gather(1, batch.labels[:, None]).squeeze(1)
        counts = batch.counts.tolist()
        parts = (log_probs.argmax(dim=-1).split(counts), gold.split(counts))
        for index, argmax, gold_part in zip(chunk, *parts, strict=True):
            target_ids = list(encoded[index].target_ids)
            found[pairs[index]] = (target_ids, argmax.tolist(), float(gold_part.mean()))
    return found


def _decode_free(
    model: EditableModel, prompts: Sequence[Prompt], lengths: Sequence[int], settings: Settings
) -> list[list[int]]:
    """Decode greedily, as many tokens as the target has."""
    asked = model.rewritten([Text(p.prompt) for p in prompts])
    tokenised = model.encode_prompts([text.prompt for text in asked])
    decoded: list[list[int]] = [[] for _ in prompts]
    for chunk in length_sorted_chunks(lengths, settings.batch_size):
        for group in _with_room(chunk, tokenised, lengths, model.context):
            longest = max(lengths[i] for i in group)
            rows = model.generate([tokenised[i] for i in group], longest)
            for index, row in zip(group, rows, strict=True):
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
