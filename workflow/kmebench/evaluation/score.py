"""All metrics of one experiment as one tidy table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from kmebench.evaluation.metrics import PROTOCOLS, as_edited, request_values, summarise
from kmebench.evaluation.schema import ORIGINAL, PREDICTIONS, check_columns

#: Columns that name a run.
RUN = ["model", "dataset", "mode", "method", "variant", "seed"]
#: What a run took, and how many of its edits could not be made, as its timing.json says.
SPENT = ["seconds_per_edit", "steps_per_call", "failed_edits"]


def read_predictions(path: str | Path, *, original: bool = False) -> pd.DataFrame:
    """Read a prediction file.

    Raises:
        KMEBenchError: a column is missing or of another type.
    """
    check_columns(pq.read_schema(path), ORIGINAL if original else PREDICTIONS, path)
    return pd.read_parquet(path)


def score_run(frame: pd.DataFrame, statistics: Mapping[str, int]) -> pd.DataFrame:
    """Score the final predictions by every protocol, and what was written by ``token``.

    Returns protocol, moment, metric, value, low, high, n.
    """
    parts = []
    for moment, protocols in (("final", PROTOCOLS), ("write", ("token", "exact"))):
        rows = frame[frame["moment"] == moment]
        if rows.empty:
            continue
        for protocol in protocols:
            summary = summarise(request_values(rows, protocol), **statistics)
            parts.append(summary.assign(protocol=protocol, moment=moment))
    return pd.concat(parts, ignore_index=True)


def score_experiment(
    experiment: str,
    runs: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    timings: Sequence[str],
    originals: Sequence[Mapping[str, Any]],
    original_files: Sequence[str],
    statistics: Mapping[str, int],
) -> pd.DataFrame:
    """Score every run and every unedited model of an experiment.

    Returns experiment, the columns of :data:`RUN`, protocol, moment, metric, value, low, high,
    n and the columns of :data:`SPENT` (NaN for the unedited model, whose method is ``original``).
    """
    parts = []
    mode = runs[0]["mode"]
    for spec, path in zip(originals, original_files, strict=True):
        frame = as_edited(read_predictions(path, original=True)).assign(moment="final")
        scored = score_run(frame, statistics)
        name = {**spec, "mode": mode, "method": "original", "variant": "default", "seed": 0}
        spent = dict.fromkeys(SPENT, float("nan"))
        parts.append(scored.assign(**name, **spent))
    for spec, path, timing in zip(runs, predictions, timings, strict=True):
        record = json.loads(Path(timing).read_text(encoding="utf-8"))
        scored = score_run(read_predictions(path), statistics)
        parts.append(scored.assign(**spec, **{name: record[name] for name in SPENT}))
    table = pd.concat(parts, ignore_index=True).assign(experiment=experiment)
    order = ["experiment", *RUN, "protocol", "moment", "metric", "value", "low", "high", "n"]
    return table[[*order, *SPENT]]
