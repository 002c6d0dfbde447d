"""What edits leave behind, and what a question costs with them."""

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, Stopwatch
from kmebench.edits.edit import overlay_tensors
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import prompts_of
from kmebench.models.editable import EditableModel

#: Questions are timed on every 40th request, on 16 at most: few, so that it costs little.
EVERY, AT_MOST = 40, 16


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
    model: EditableModel, requests: Sequence[EditRequest], settings: Settings
) -> dict[str, float]:
    """Time questions about some of the requests ``before`` the edits and ``after``, ms each.

    A question is a prompt with all answers that are scored behind it; the time is that of one
    scoring pass over all of them. Other weights take the same time, so ``before`` is the same
    model without its overlays. Where it has none the two are one measurement.
    """
    step = max(EVERY, -(-len(requests) // AT_MOST))
    prompts = [prompt for r in requests[::step] for prompt in prompts_of(r, 0)]

    def timed() -> float:
        stopwatch = Stopwatch()
        with stopwatch("score"):
            predict(model, prompts, settings, decode=False)
        return 1000 * stopwatch.seconds["score"] / len(prompts)

    after = timed()
    if not model.edits.overlays:
        return {"before": after, "after": after}
    with model.edits.savepoint():
        model.edits.overlays = {}
        return {"before": timed(), "after": after}


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
