"""Statistics of stored predictions: values of requests, summaries, intervals, differences.

Values are means inside a request first, then over requests. All intervals are 95% percentile
intervals of one bootstrap over requests, or exact where it has no width. No model, no torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import METRICS, PROTOCOLS, Metric, metrics_of

#: Editors are compared from so many edits on. One that is right four times in five gets each of
#: four edits right in 41% of draws, and its bootstrap interval then has no width; of twenty, in 1%.
ENOUGH_EDITS = 20
#: Numbers that are resampled at once.
_BLOCK = 1 << 22
_ENDS = (2.5, 97.5)  # of a 95% interval, percent
#: What a p-value is below where two runs differ.
SIGNIFICANT = 0.05


def request_values(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Score every request: case_id, position and every metric of prompts (NaN: no prompt).

    ``frame`` holds predictions asked at one time; without ``before_ids`` (the unedited model)
    there is no locality. A request has no Score: that is the mean of the parts' means, and not
    every request need have every part.

    Raises:
        KMEBenchError: rows asked at several times would be mixed.
    """
    at_milestones = (frame["when"] == "milestone").any()
    if frame["when"].nunique() > 1 or (at_milestones and frame["edits_done"].nunique() > 1):
        raise KMEBenchError("Predictions of several times in a run cannot be scored together.")
    judge = PROTOCOLS[protocol]
    rows = frame[frame[judge.reads].notna()]
    names = [metric for metric in metrics_of("request") if metric.kinds]
    values = pd.concat(
        [_values(rows, metric, protocol).rename(metric.name) for metric in names], axis=1
    )
    return values.sort_index().rename_axis(["position", "case_id"]).reset_index()


def _values(rows: pd.DataFrame, metric: Metric, protocol: str) -> pd.Series:
    """One metric of every request that has prompts for it, by (position, case_id)."""
    if not set(metric.columns) <= set(rows.columns):
        rows = rows[:0]
    asked = rows[rows["kind"].isin(metric.kinds)]
    hits = [metric.score(row, PROTOCOLS[protocol]) for row in asked.to_dict("records")]
    by_request = pd.Series(hits, asked.index, dtype=float).groupby(
        [asked["position"], asked["case_id"]]
    )
    return by_request.agg(metric.aggregate)


def _composites() -> list[Metric]:
    return [metric for metric in metrics_of("request") if metric.parts]


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
    """Mean of every metric over requests, with its bootstrap interval.

    Returns metric, value, low, high, n (requests with a value, or with a part's). Requests are
    resampled jointly, so the interval of Score knows that its three parts go together. Score is
    the mean of its parts' means; only a part that compares with the unedited model may be missing.
    Where all requests have 0, or all 1, the interval is :func:`exact_at_edges`; that of Score is
    composed of its parts' where all of these are such.
    """
    measured = [m.name for m in metrics_of("request") if m.kinds and values[m.name].notna().any()]
    composites = [m for m in _composites() if set(_required(m)) <= set(measured)]
    if not measured:
        return pd.DataFrame(columns=["metric", "value", "low", "high", "n"])

    def means(samples: np.ndarray) -> np.ndarray:
        found = _mean(samples)
        whole = [_composed(found, m, measured) for m in composites]
        return np.column_stack([found, *whole])

    table = np.ascontiguousarray(values[measured], dtype=float)
    value, *ends = bootstrap(table, means, resamples=resamples, seed=seed)
    low, high = _with_exact_ends(table, np.stack(ends), measured, composites)
    known = ~np.isnan(table)
    of_parts = [known[:, [name in m.parts for name in measured]] for m in composites]
    counts = [*known.sum(axis=0), *(parts.any(axis=1).sum() for parts in of_parts)]
    names = [*measured, *(m.name for m in composites)]
    columns = {"metric": names, "value": value, "low": low, "high": high, "n": counts}
    return pd.DataFrame(columns)


def _with_exact_ends(
    table: np.ndarray, ends: np.ndarray, measured: Sequence[str], composites: Sequence[Metric]
) -> np.ndarray:
    """Put exact ends into intervals [2, K + C] of K metrics of ``table`` [n, K], C composites."""
    k = len(measured)
    shares = [METRICS[name].unit == "percent" for name in measured]
    exact = np.where(shares, exact_at_edges(table, ends[:, :k]), ends[:, :k])
    at_edge = (exact != ends[:, :k]).any(axis=0)
    whole = []
    for metric, old in zip(composites, ends.T[k:], strict=True):
        parts = [name in metric.parts for name in measured]
        whole.append(_composed(exact, metric, measured) if at_edge[parts].all() else old)
    return np.column_stack([exact, *whole])


def _required(composite: Metric) -> list[str]:
    """The parts that a composite cannot do without."""
    return [part for part in composite.parts if not METRICS[part].columns]


def _composed(means: np.ndarray, composite: Metric, names: Sequence[str]) -> np.ndarray:
    """A composite of means [b, K] with those names; NaN where a required part is."""
    table = pd.DataFrame(means, columns=list(names))
    parts = table[[part for part in composite.parts if part in names]]
    known = table[_required(composite)].notna().all(axis=1)
    return parts.agg(composite.aggregate, axis=1).where(known).to_numpy()


def mean_of(values: pd.DataFrame, metric: Metric) -> float:
    """Return the mean of a metric over requests; of a composite, composed of its parts' means."""
    return float(_value(values[_columns(metric)].to_numpy(dtype=float)[None], metric)[0])


def _columns(metric: Metric) -> list[str]:
    """The columns of :func:`request_values` that a metric is made of."""
    return list(metric.parts) or [metric.name]


def _value(samples: np.ndarray, metric: Metric) -> np.ndarray:
    """A metric [b] of samples [b, n, K] of its columns."""
    means = _mean(samples)
    return _composed(means, metric, metric.parts) if metric.parts else means[:, 0]


def _mean(samples: np.ndarray) -> np.ndarray:
    """Mean over axis 1 without NaN; NaN where nothing is left."""
    known = ~np.isnan(samples)
    count = known.sum(axis=1)
    total = np.where(known, samples, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = _mean,
    /,
    *,
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a statistic of ``values`` [n, ...] with its 95% percentile bootstrap interval.

    ``statistic`` maps samples [b, n, ...] to their values [b, ...]; by default the mean without
    NaN. Samples without a value are left out of the interval.
    """
    low, high = np.nanpercentile(_draws(values, statistic, resamples, seed), _ENDS, axis=0)
    return statistic(values[None])[0], low, high


def _draws(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> np.ndarray:
    """A statistic of every resample of ``values`` [n, ...]: [resamples, ...]."""
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    blocks = np.array_split(picks, -(-resamples * values.size // _BLOCK))
    return np.concatenate([statistic(values[block]) for block in blocks])


def exact_at_edges(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return intervals [2, ...] of means of ``values`` [n, ...] in [0, 1], given as ``ends``.

    Where all values are 0, or all 1, all resamples are alike, and the bootstrap has no width.
    There the inner end is Clopper and Pearson's (1934) of n in n, 0.025^(1/n): a mean is at least
    the share of ones. NaN do not count.
    """
    inner = 0.025 ** (1 / (~np.isnan(values)).sum(axis=0))
    low = np.where(np.nanmin(values, axis=0) == 1, inner, ends[0])
    high = np.where(np.nanmax(values, axis=0) == 0, 1 - inner, ends[1])
    return np.stack([low, high])


class Difference(NamedTuple):
    """a − b: the mean, its 95% paired interval, a two-sided p-value, and the requests.

    NaN of no requests where both were asked nothing that the metric scores.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired_difference(
    a: pd.DataFrame, b: pd.DataFrame, metric: str, *, resamples: int = 1000, seed: int = 0
) -> Difference:
    """Return a metric of a − that of b on the same requests.

    ``a`` and ``b`` are results of :func:`request_values`. What one of the two was not asked does
    not count for the other. Of a composite, both are composed and then subtracted.

    Raises:
        KMEBenchError: the two hold different requests.
    """
    joined = a.merge(b, on="case_id", suffixes=("_a", "_b"), validate="1:1")
    if not len(a) == len(b) == len(joined):
        raise KMEBenchError("Editors can be compared in pairs only on the same requests.")
    measured = METRICS[metric]
    sides = [joined[[f"{name}_{side}" for name in _columns(measured)]] for side in "ab"]
    values = np.stack([side.to_numpy(dtype=float) for side in sides], axis=1)  # [n, 2, K]
    values[np.broadcast_to(np.isnan(values).any(axis=1, keepdims=True), values.shape)] = np.nan
    values = values[~np.isnan(values).all(axis=(1, 2))]

    def difference(samples: np.ndarray) -> np.ndarray:
        found = _value(samples[:, :, 0], measured) - _value(samples[:, :, 1], measured)
        return np.round(found, 12)  # what is equal but for rounding, is equal

    mean = float(difference(values[None])[0])
    if np.isnan(mean):
        return Difference(mean, mean, mean, mean, 0)
    draws = _draws(values, difference, resamples, seed)
    low, high = np.nanpercentile(draws, _ENDS)
    return Difference(mean, float(low), float(high), _two_sided(draws), len(values))


def _two_sided(draws: np.ndarray) -> float:
    """Twice the share of draws that zero or the other sign has; at least that of one draw."""
    known = draws[~np.isnan(draws)]
    share = min((known <= 0).mean(), (known >= 0).mean())
    return float(min(1.0, 2 * max(share, 1 / len(draws))))


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979); NaN stay, and do not count.

    Where nothing differs, one of m falls below a level with a probability of that level at most.
    How many resamples a p-value has to come from: :func:`enough_resamples`.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)  # NaN come last
    m = np.count_nonzero(~np.isnan(values))
    stepped = np.maximum.accumulate(values[order] * (m - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def enough_resamples(tests: int) -> int:
    """Return the fewest resamples of which one of so many p-values can be significant by Holm.

    No p-value of R resamples is below 2 / R, and the least of m counts m times: R > 2 m / α.
    """
    return math.floor(2 * tests / SIGNIFICANT) + 1


def cohorts(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Efficacy and generality along consecutive edits, by cohort of edits.

    Returns edits_done, cohort (number of the cohort's last edit: 1, 3, 10, 30, ...), efficacy,
    generality, n; one row for every milestone and every cohort written by then.
    """
    rows = []
    milestones = frame[frame["when"].isin(["milestone", "final"])]
    for done, at in milestones.groupby("edits_done"):
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
