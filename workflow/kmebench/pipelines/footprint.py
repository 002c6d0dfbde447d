"""What edits leave behind, and what a question costs with them."""

import random
import time
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median

import pandas as pd
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Stopwatch
from kmebench.edits.edit import overlay_tensors
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt, prompts_of
from kmebench.models.editable import EditableModel

#: Questions about so many requests are timed, each so often by turns with and without overlays.
REQUESTS, REPEATS = 16, 3
#: So long as that takes no more than this share of the evaluation so far; two requests at least.
SHARE, AT_LEAST = 0.02, 2


def bytes_left(model: EditableModel, editor: Editor) -> dict[str, int]:
    """Return the bytes that all edits so far have left.

    ``change``: what turns the original model into this one, as ``delta.safetensors`` holds it: one
    number in float32 or better for every entry of a weight that was touched, with the numbers of
    the segments where only some were; and the tensors of the overlays. ``state``: what the editor
    remembers for the next edit. Neither the model nor cached stages (covariance, encoder) count.
    """
    carried = {**model.edits.state(), **overlay_tensors(model.edits.overlays)}
    return {"change": _nbytes(carried), "state": _nbytes(editor.state_dict())}


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def question_milliseconds(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: Settings,
    evaluation_seconds: float,
) -> dict[str, float]:
    """Time questions about some of the requests ``before`` the edits and ``after``, ms each.

    A question is a prompt with all answers that are scored behind it; a request's are scored in
    one pass. Other weights take the same time, so ``before`` is the same model without its
    overlays, timed right after it. Where it has none the two are one measurement. Of each request
    the median of its repeats counts, so that a machine that was busy for a moment does not.

    Requests are drawn from all, in random order: those that :data:`SHARE` of
    ``evaluation_seconds`` leaves time for are a sample too. ``questions`` says how many were
    timed, ``repeats`` how often the first of them.
    """
    drawn = random.Random(0).sample(list(requests), min(len(requests), REQUESTS))
    prompts = [prompts_of(request, 0) for request in drawn]
    carried = model.edits.overlays
    after: list[list[float]] = [[] for _ in prompts]
    before: list[list[float]] = [[] for _ in prompts] if carried else after

    def timed(asked: Sequence[Prompt]) -> float:
        stopwatch = Stopwatch()
        with stopwatch("score"):
            predict(model, asked, settings, decode=False)
        return 1000 * stopwatch.seconds["score"]

    end = time.perf_counter() + SHARE * evaluation_seconds
    for turn, (index, asked) in product(range(REPEATS), enumerate(prompts)):
        if (turn or index >= AT_LEAST) and time.perf_counter() > end:
            break
        after[index].append(timed(asked))
        if carried:
            with model.edits.savepoint():
                model.edits.overlays = {}
                before[index].append(timed(asked))
    questions = sum(len(asked) for asked, spent in zip(prompts, after, strict=True) if spent)

    def each(spent: Sequence[Sequence[float]]) -> float:
        return sum(median(seconds) for seconds in spent if seconds) / questions

    found = {"before": each(before), "after": each(after)}
    return found | {"questions": questions, "repeats": len(after[0])}


def gate_shares(predictions: pd.DataFrame) -> dict[str, float]:
    """Return the share of questions by kind that a gate opened for, at the end of a run.

    A question is a prompt of a request. Empty for edits without a gate.
    """
    final = predictions[predictions["when"] == "final"]
    asked = final[final["gate"].notna()]
    return {
        kind: float(gates.astype(float).mean())
        for kind, gates in asked.groupby("kind", sort=False)["gate"]
    }
