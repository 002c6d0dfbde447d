"""What became of consecutive edits, and what came after them that may have undone them.

No model, no torch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from kmebench.data.records import EditRequest
from kmebench.evaluation.statistics import bootstrap, request_values

#: What became of an edit: never written, written and lost later, or kept to the end.
FATES = ("never written", "lost", "kept")


def fates(frame: pd.DataFrame) -> pd.DataFrame:
    """Say what became of every edit of a consecutive run: position, case_id, fate.

    An edit is written if every token of its target is right just after it (protocol ``exact``),
    and kept if it is so after the last edit. ``frame`` holds the run's predictions. Edits that
    failed were never written.
    """
    written, kept = (
        request_values(frame[frame["when"] == when], "exact").set_index("position")
        for when in ("write", "final")
    )
    was_written = (written["efficacy"] == 1).reindex(kept.index, fill_value=False)
    fate = np.select([~was_written, kept["efficacy"] < 1], FATES[:2], FATES[2])
    return kept[["case_id"]].assign(fate=fate).reset_index().sort_values("position")


def again_later(
    requests: Sequence[EditRequest], of: Callable[[EditRequest], str], window: int
) -> np.ndarray:
    """Return whether one of the ``window`` requests that follow has the same value of ``of``.

    Of all requests that so many follow: older ones have more chances, and are lost more often.
    """
    values = [of(request) for request in requests]
    return np.array([v in values[i + 1 : i + 1 + window] for i, v in enumerate(values[:-window])])


def same_subject(request: EditRequest) -> str:
    """Return the subject, as :func:`again_later` compares it."""
    return request.subject.casefold()


def same_relation(request: EditRequest) -> str:
    """Return the relation, or the prompt's words without the subject where none is given."""
    return request.relation or request.asked_of("")


def closest_later(keys: np.ndarray, window: int) -> np.ndarray:
    """Return the largest cosine of every key with one of the ``window`` keys that follow it, [E].

    NaN where fewer follow: the maximum over fewer keys is smaller by itself. ``keys`` [E, M].
    """
    units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    found = np.full(len(units), np.nan)
    for i in range(len(units) - window):
        found[i] = (units[i + 1 : i + 1 + window] @ units[i]).max()
    return found


def between_groups(
    values: np.ndarray, first: np.ndarray, /, *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return the mean of ``values`` [E] where ``first`` [E] minus that elsewhere; 95% interval.

    NaN are left out. All three are NaN if a group has fewer than two values.
    """
    known = ~np.isnan(values)
    if min(first[known].sum(), (~first[known]).sum()) < 2:
        return np.nan, np.nan, np.nan

    def difference(samples: np.ndarray) -> np.ndarray:
        value, inside = samples[..., 0], samples[..., 1]
        with np.errstate(invalid="ignore"):  # a sample that holds one group alone
            means = [(value * w).sum(axis=1) / w.sum(axis=1) for w in (inside, 1 - inside)]
        return np.asarray(means[0] - means[1])

    table = np.column_stack([values[known], first[known]])
    mean, low, high = bootstrap(table, difference, resamples=resamples, seed=seed)
    return float(mean), float(low), float(high)
