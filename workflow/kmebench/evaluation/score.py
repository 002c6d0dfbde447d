"""All metrics of one experiment as one tidy table."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import HEALTH, PROTOCOLS, Metric, metrics_of
from kmebench.evaluation.schema import ORIGINAL, PREDICTIONS, check_columns
from kmebench.evaluation.statistics import (
    as_edited,
    enough_resamples,
    holm,
    mean_of,
    paired_difference,
    request_values,
    summarise,
)
from kmebench.io.checked_files import read_json, read_parquet, trusted
from kmebench.modes import DEFAULT

#: Columns that name a run.
RUN = ["model", "dataset", "mode", "method", "variant", "seed"]
#: What a run took, and how many of its edits could not be made, as its timing.json says.
SPENT = ["seconds_per_edit", "steps_per_call", "failed_edits"]


def read_predictions(path: str | Path, *, original: bool = False) -> pd.DataFrame:
    """Read a prediction file.

    Raises:
        KMEBenchError: a column is missing or of another type, or the file is damaged.
    """
    with trusted(path):
        schema = pq.read_schema(path)
    check_columns(schema, ORIGINAL if original else PREDICTIONS, path)
    return read_parquet(path)


#: When a model is asked, each with the protocols that score it: free generation comes at the end.
WHEN = {
    "final": tuple(PROTOCOLS),
    "write": ("token", "exact"),
    "milestone": ("token", "exact"),
    "newest": ("token",),
}
#: So many edits before a milestone are its newest, as they were right after each.
NEWEST = 100


def parts_of(frame: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Split predictions into (when, edits done, rows); what was written belongs together.

    Of runs of more than :data:`NEWEST` edits, what was written last is split off at every
    milestone and the end: can the model still be edited?
    """
    of = {when: frame[frame["when"] == when] for when in WHEN}
    milestones = of["milestone"].groupby("edits_done")
    for when in ("final", "write"):
        if len(of[when]):
            yield when, int(of[when]["edits_done"].max()), of[when]
    for done, rows in milestones:
        yield "milestone", int(done), rows
    written = of["write"]["edits_done"]
    if len(written) and written.max() > NEWEST:
        for done in [*milestones.groups, written.max()]:
            newest = (written > done - NEWEST) & (written <= done)
            yield "newest", int(done), of["write"][newest]


def score_run(frame: pd.DataFrame, statistics: Mapping[str, int]) -> pd.DataFrame:
    """Score the predictions of every time of asking by its protocols.

    Returns protocol, when, edits_done, metric, value, low, high, n.
    """
    parts = []
    for when, done, rows in parts_of(frame):
        for protocol in WHEN[when]:
            summary = summarise(request_values(rows, protocol), **statistics)
            parts.append(summary.assign(protocol=protocol, when=when, edits_done=done))
    return pd.concat(parts, ignore_index=True)


def score_states(path: str | Path) -> pd.DataFrame:
    """Score the model states of a run, from its health.json; the last one is the final model.

    Returns the columns of :func:`score_run`. The protocol is :data:`HEALTH`. A state is measured
    once, so it has no interval; n is the number of neutral tokens.

    Raises:
        KMEBenchError: the file lacks a measurement.
    """
    states = read_json(path)
    for metric, state in product(metrics_of("state"), states):
        for column in set(metric.columns) - set(state):
            raise KMEBenchError(
                f"{path} has no {column!r}; it was made by another version: delete it and run the "
                "workflow again."
            )
    rows = [
        {
            "metric": metric.name,
            "value": metric.score(state),
            "n": state["tokens"],
            "when": "final" if state is states[-1] else "milestone",
            "edits_done": state["edits_done"],
        }
        for state in states
        for metric in metrics_of("state")
    ]
    nan = float("nan")
    return pd.DataFrame(rows).assign(low=nan, high=nan, protocol=HEALTH)


def score_experiment(
    experiment: str,
    runs: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    timings: Sequence[str],
    originals: Sequence[Mapping[str, str]],
    original_files: Sequence[str],
    statistics: Mapping[str, int],
    health: Sequence[str] = (),
    controls: Collection[str] = (),
) -> pd.DataFrame:
    """Score every run and every unedited model of an experiment.

    ``health``: one health.json of every run, or none at all; ``controls``: methods that are no
    rivals. Returns experiment, the columns of :data:`RUN`, protocol, when, edits_done, metric,
    value, low, high, n, the columns of :data:`SPENT` (NaN for the unedited model, whose method is
    ``original``) and those of :func:`behind_best` (NaN for controls).
    """
    parts, finals = [], []
    mode = runs[0]["mode"]
    for spec, path in zip(originals, original_files, strict=True):
        frame = as_edited(read_predictions(path, original=True))
        scored = score_run(frame.assign(when="final", edits_done=0), statistics)
        name = {**spec, "mode": mode, "method": "original", "variant": DEFAULT, "seed": 0}
        spent = dict.fromkeys(SPENT, float("nan"))
        parts.append(scored.assign(**name, **spent))
    measured: Sequence[str | None] = health or [None] * len(runs)
    files = zip(runs, predictions, timings, measured, strict=True)
    for spec, path, timing, states in files:
        record = read_json(timing)
        frame = read_predictions(path)
        named = {**spec, **{name: record[name] for name in SPENT}}
        parts.append(score_run(frame, statistics).assign(**named))
        if states:
            parts.append(score_states(states).assign(**named))
        if spec["method"] not in controls:
            finals.append((spec, frame[frame["when"] == "final"]))
    table = pd.concat(parts, ignore_index=True).assign(experiment=experiment)
    order = ["experiment", *RUN, "protocol", "when", "edits_done", "metric"]
    order += ["value", "low", "high", "n", *SPENT]
    keys = [*RUN, "protocol", "when", "metric"]
    return table[order].merge(behind_best(finals, statistics), "left", keys, validate="m:1")


def behind_best(
    finals: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], statistics: Mapping[str, int]
) -> pd.DataFrame:
    """Compare every run with the best run of its model and data set, on the same requests.

    ``finals``: runs with their final predictions. Returns the columns of :data:`RUN`, protocol,
    when, metric, and ``behind``, ``behind_low``, ``behind_high``: the best run's value minus
    this one's with its 95% paired bootstrap interval; 0 for the best. ``behind_p``: the p-value of
    this difference, two-sided, by Holm over all runs that are compared with the best (NaN there).
    These are so many that some p-value can be significant, or there are more resamples.
    """
    columns = [*RUN, "protocol", "when", "metric"]
    columns += ["behind", "behind_low", "behind_high", "behind_p"]
    cells: dict[tuple, list] = {}
    for spec, frame in finals:
        cells.setdefault((spec["model"], spec["dataset"]), []).append((spec, frame))
    rows = []
    for runs, protocol in product(cells.values(), PROTOCOLS):
        values = [request_values(frame, protocol) for _, frame in runs]
        for metric in metrics_of("request", tabled=True):
            behind = _behind(values, metric, statistics)
            rows += [
                (*(spec[k] for k in RUN), protocol, "final", metric.name, *numbers)
                for (spec, _), numbers in zip(runs, behind, strict=True)
            ]
    return pd.DataFrame(rows, columns=columns)


def _behind(
    values: Sequence[pd.DataFrame], metric: Metric, statistics: Mapping[str, int]
) -> list[tuple[float, float, float, float]]:
    """Difference of the best to each, its interval and p; NaN where nothing was predicted."""
    nan = float("nan")
    means = [metric.direction * mean_of(v, metric) for v in values]
    if np.isnan(means).all():
        return [(nan,) * 4] * len(values)
    best = int(np.nanargmax(means))
    least = enough_resamples(len(values) - 1)
    statistics = {**statistics, "resamples": max(statistics["resamples"], least)}
    found = [
        (0.0, 0.0, 0.0, nan)
        if index == best
        else paired_difference(values[best], other, metric.name, **statistics)[:4]
        for index, other in enumerate(values)
    ]
    adjusted = holm([p for *_, p in found])
    return [(mean, low, high, p) for (mean, low, high, _), p in zip(found, adjusted, strict=True)]
