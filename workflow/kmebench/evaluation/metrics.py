"""Metrics from stored predictions alone; no model, no torch.

Protocols (each a way to decide whether a prediction is right):

- ``token``: share of target tokens that are the argmax, teacher-forced (the paper's tables);
- ``exact``: all of them;
- ``free``: greedy decoding to the gold length gives exactly the target's tokens;
- ``wild``: greedy decoding with a question-answer prompt and a natural stop begins with the
  target, after normalisation (Yang et al. 2025, without a judge; see `answers`);
- ``probability``: P(target_new) > P(target_true), per token (Meng et al. 2022).

Efficacy, Generality and Portability ask for the target on edit, paraphrase and portability
prompts; Locality asks for the unedited model's answer on unrelated prompts (``probability``:
that the true answer stays ahead of target_new). Values are means inside a request first, then
over requests. Score is the mean of Efficacy, Generality and Locality.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from kmebench.errors import KMEBenchError
from kmebench.evaluation.answers import begins_with, normalise

METRICS = ("efficacy", "generality", "locality", "portability")
#: What Score is the mean of.
PARTS = ("efficacy", "generality", "locality")
#: What the paper reports.
SCORED = ("efficacy", "generality", "locality", "score")
KINDS = {
    "edit": "efficacy",
    "paraphrase": "generality",
    "locality": "locality",
    "portability": "portability",
}


def _token_share(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(wanted)))


def _all_equal(predicted: Sequence[int] | None, wanted: Sequence[int] | None) -> float:
    return float(list(predicted) == list(wanted))


def _hit(row: Mapping, protocol: str) -> float:
    """Score one prompt: 1 right, 0 wrong, NaN where the protocol does not apply."""
    unrelated = row["kind"] == "locality"
    if protocol in ("token", "exact"):
        wanted = row["before_ids"] if unrelated else row["target_ids"]
        compare: Callable = _token_share if protocol == "token" else _all_equal
        return compare(row["after_ids"], wanted)
    if protocol == "free":
        wanted = row["free_before_ids"] if unrelated else row["target_ids"]
        return _all_equal(row["free_after_ids"], wanted)
    if protocol == "wild":
        if unrelated:
            return float(normalise(row["wild_before"]) == normalise(row["wild_after"]))
        return float(begins_with(row["wild_after"], row["target"]))
    new, true = row["target_new_logprob_after"], row["target_true_logprob_after"]
    if np.isnan(new) or np.isnan(true):
        return float("nan")
    return float(true > new if unrelated else new > true)


#: Columns that a protocol reads; where one is empty the protocol was not run.
_READS = {
    "token": "after_ids",
    "exact": "after_ids",
    "free": "free_after_ids",
    "wild": "wild_after",
    "probability": "target_new_logprob_after",
}
PROTOCOLS = tuple(_READS)


def request_values(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Score every request: columns case_id, position and the four metrics (NaN: no prompt).

    ``frame`` holds predictions of one moment; without ``before_ids`` (the unedited model)
    there is no locality.

    Raises:
        KMEBenchError: rows of several moments would be mixed.
    """
    at_checkpoints = (frame["moment"] == "checkpoint").any()
    if frame["moment"].nunique() > 1 or (at_checkpoints and frame["edits_done"].nunique() > 1):
        raise KMEBenchError("Predictions of several moments cannot be scored together.")
    rows = frame[frame[_READS[protocol]].notna()]
    if "before_ids" not in rows:
        rows = rows[rows["kind"] != "locality"]
    hits = pd.DataFrame(
        {
            "case_id": rows["case_id"],
            "position": rows["position"],
            "metric": rows["kind"].map(KINDS),
            "hit": [_hit(row, protocol) for row in rows.to_dict("records")],
        }
    )
    values = hits.groupby(["position", "case_id", "metric"])["hit"].mean().unstack("metric")
    return values.reindex(columns=list(METRICS)).reset_index()


def as_edited(original: pd.DataFrame) -> pd.DataFrame:
    """Give the unedited model's predictions the column names of a run, without "before"."""
    return original.rename(
        columns={
            "ids": "after_ids",
            "target_new_logprob": "target_new_logprob_after",
            "target_true_logprob": "target_true_logprob_after",
            "free_ids": "free_after_ids",
            "wild": "wild_after",
        }
    )


def summarise(values: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean of every metric over requests, with a 95% percentile bootstrap interval.

    Returns metric, value, low, high, n (requests with a value). Requests are resampled
    jointly, so the interval of Score knows that its three parts go together.
    """
    table = values[list(METRICS)].to_numpy(dtype=float)
    table = np.column_stack([table, np.full(len(table), np.nan)])
    means = _with_score(_mean(table, axis=0))
    generator = np.random.default_rng(seed)
    draws = np.stack(
        [
            _with_score(_mean(table[generator.integers(len(table), size=len(table))], axis=0))
            for _ in range(resamples)
        ]
    )
    rows = []
    for column, metric in enumerate((*METRICS, "score")):
        if np.isnan(means[column]):
            continue
        known = draws[~np.isnan(draws[:, column]), column]
        low, high = np.percentile(known, [2.5, 97.5])
        n = len(table) if metric == "score" else int((~np.isnan(table[:, column])).sum())
        rows.append((metric, means[column], low, high, n))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"])


def _mean(table: np.ndarray, axis: int) -> np.ndarray:
    """Mean without NaN; NaN where nothing is left."""
    known = ~np.isnan(table)
    count = known.sum(axis=axis)
    total = np.where(known, table, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _with_score(means: np.ndarray) -> np.ndarray:
    """Fill the last entry with the mean of efficacy, generality and, if any, locality."""
    parts = means[:3]
    if not np.isnan(parts[:2]).any():
        means[-1] = parts[~np.isnan(parts)].mean()
    return means


def paired_difference(
    a: pd.DataFrame, b: pd.DataFrame, metric: str, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float, int]:
    """Return the mean of a − b over the same requests, its 95% interval, and their number.

    ``a`` and ``b`` are results of :func:`request_values`; the metric ``score`` is the mean of
    efficacy, generality and locality (every request has them).

    Raises:
        KMEBenchError: the two hold different requests.
    """
    if metric == "score":
        a, b = (x.assign(score=x[list(PARTS)].mean(axis=1)) for x in (a, b))
    joined = a.merge(b, on="case_id", suffixes=("_a", "_b"), validate="1:1")
    if not len(a) == len(b) == len(joined):
        raise KMEBenchError("Editors can be compared in pairs only on the same requests.")
    difference = (joined[f"{metric}_a"] - joined[f"{metric}_b"]).dropna().to_numpy()
    return (*bootstrap(difference, resamples=resamples, seed=seed), len(difference))


def bootstrap(values: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float, float]:
    """Return the mean of ``values`` [n] with its 95% percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def cohorts(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Efficacy and generality along consecutive edits, by cohort of edits.

    Returns edits_done, cohort (number of the cohort's last edit: 1, 3, 10, 30, ...), efficacy,
    generality, n; one row for every checkpoint and every cohort written by then.
    """
    rows = []
    checkpoints = frame[frame["moment"].isin(["checkpoint", "final"])]
    for done, at in checkpoints.groupby("edits_done"):
        values = request_values(at, protocol)
        values["cohort"] = [cohort_of(position + 1) for position in values["position"]]
        for cohort, part in values.groupby("cohort"):
            means = part[["efficacy", "generality"]].mean()
            rows.append((done, cohort, means["efficacy"], means["generality"], len(part)))
    return pd.DataFrame(rows, columns=["edits_done", "cohort", "efficacy", "generality", "n"])


def cohort_of(edit: int) -> int:
    """Return the smallest of 1, 3, 10, 30, 100, ... that is not below ``edit``."""
    power = 1
    while True:
        for bound in (power, 3 * power):
            if edit <= bound:
                return bound
        power *= 10
