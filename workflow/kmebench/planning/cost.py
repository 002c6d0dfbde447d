"""What a grid costs: hours and disk, from measured seconds per edit. Imports no torch.

Seconds come from the ``timing.json`` files of finished runs. A model that has none takes those of
a measured model, scaled by the one number that the paper gives for it: PAC's seconds per edit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kmebench.editors.needs import Inverse, Paths, Spectrum
from kmebench.io.checked_files import read_json
from kmebench.planning import grid

PAPER_TIMES = Path("resources/paper/time.csv")
_TIMED = ("consecutive", "pac")  # what its times are of
_MASTER, _FACTOR = 4, 8  # bytes of a float32, and of a float64
_RUN = ("model", "dataset", "mode", "method", "variant")


def measurements(folders: Iterable[Path]) -> pd.DataFrame:
    """Read every finished run below ``folders``: one row each.

    Columns: model, dataset, mode, method, variant, ``editing`` and ``evaluation`` (seconds per
    edit; evaluation is NaN for runs of version 0.1.0, which did not note it), ``predictions``
    (bytes per edit).
    """
    rows = []
    for folder in folders:
        for path in sorted(folder.glob("**/runs/*/*/*/*/*/seed*/timing.json")):
            timing = read_json(path)
            n = timing["requests"]
            rows.append(
                dict(zip(_RUN, path.parts[-7:-2], strict=True))
                | {
                    "editing": timing["seconds_per_edit"],
                    "evaluation": timing.get("evaluation_seconds", np.nan) / n,
                    "predictions": path.with_name("predictions.parquet").stat().st_size / n,
                }
            )
    return pd.DataFrame(rows, columns=[*_RUN, "editing", "evaluation", "predictions"])


def run_costs(config: Mapping[str, Any], measured: pd.DataFrame) -> pd.DataFrame:
    """Estimate every run of the grid: one row each, sorted.

    Columns: those of :class:`~kmebench.planning.grid.Run`, edits, ``editing`` and
    ``evaluation`` (hours, NaN where nothing is known), ``hours`` (what is
    known of their sum), ``source`` (of ``editing``): measured, scaled or unknown.
    """
    seconds = _medians(measured)
    scales = {model: _scale(config, model, seconds) for model in config["models"]}
    sizes = grid.datasets(config)
    rows = []
    for run in grid.all_runs(config):
        known, source, scale = (run.model, run.mode, run.method), "measured", 1.0
        if known not in seconds.index and (scaled := scales[run.model]):
            reference, scale = scaled
            known, source = (reference, run.mode, run.method), "scaled"
        found = known in seconds.index
        hours = dict.fromkeys(("editing", "evaluation"), np.nan)
        if found:
            hours |= seconds.loc[known] * scale * sizes[run.dataset] / 3600
        rows.append(
            asdict(run)
            | {"edits": sizes[run.dataset], "source": source if found else "unknown"}
            | hours
        )
    costs = pd.DataFrame(rows)
    return costs.assign(hours=costs[["editing", "evaluation"]].sum(axis=1, min_count=1))


def _medians(measured: pd.DataFrame) -> pd.DataFrame:
    """Median seconds per edit by (model, mode, method), over data sets and variants."""
    return measured.groupby(["model", "mode", "method"])[["editing", "evaluation"]].median()


def _scale(
    config: Mapping[str, Any], model: str, seconds: pd.DataFrame
) -> tuple[str, float] | None:
    """How many times longer an edit of ``model`` takes than one of a measured model (its name).

    By the paper's seconds per edit of PAC over our own; None where either is missing.
    """
    times = pd.read_csv(PAPER_TIMES).query("editor == 'Ours'").set_index("model")
    name = config["models"][model].get("paper_name")
    measured = seconds["editing"].dropna().unstack("model")
    if name not in times.index or _TIMED not in measured.index:
        return None
    # Of the models on which PAC has been measured, that of which most other editors have been too.
    ours = measured.loc[_TIMED].dropna()
    reference = measured[ours.index].count().idxmax()
    return reference, times["seconds_per_edit"][name] / ours[reference]


def wall_hours(costs: pd.DataFrame, devices: int) -> float:
    """Hours that a grid takes at least: runs are serial, so never less than the longest.

    Schedules the longest run first, each on the device that is free soonest.
    """
    free = np.zeros(devices)
    for hours in costs["hours"].dropna().sort_values()[::-1]:
        free[free.argmin()] += hours
    return float(free.max())


def disk(config: Mapping[str, Any], measured: pd.DataFrame) -> pd.DataFrame:
    """Estimate the bytes below ``results``: one row per model.

    Columns: model, weights, gradients, covariance (with its inverses and spectra), deltas (at
    most), predictions. Models without
    ``shape`` in the config have NaN where it is needed.
    """
    sizes, per_edit = grid.datasets(config), measured["predictions"].median()
    rows = []
    for name, spec in config["models"].items():
        runs = [run for run in grid.all_runs(config) if run.model == name]
        if not runs:
            continue
        predicted = sum(sizes[run.dataset] for run in runs) * per_edit
        row = {"model": name, "predictions": predicted}
        if shape := spec.get("shape"):
            width, layers = shape["ffn_width"], shape["layers"]
            matrix = shape["width"] * width * _MASTER
            traced = {run.dataset for run in runs if grid.needed(config, run, Paths)}
            covered = grid.measured_layers(config, name)
            needs = {need for run in runs for need in grid.needs_of(config, run)}
            factors = [need for need in needs if isinstance(need, Inverse | Spectrum)]
            row["weights"] = shape["parameters"] * grid.BYTES[spec["dtype"]]
            row["gradients"] = sum(sizes[d] for d in traced) * 2 * 2 * layers * width * _MASTER
            row["covariance"] = (len(covered) * _MASTER + len(factors) * _FACTOR) * width**2
            row["deltas"] = matrix * sum(_matrices(config, run, layers) for run in runs)
        rows.append(row)
    columns = ["model", "weights", "gradients", "covariance", "deltas", "predictions"]
    return pd.DataFrame(rows, columns=columns)


def _matrices(config: Mapping[str, Any], run: grid.Run, layers: int) -> int:
    """FFN matrices that the saved delta of a run holds at most; a batch's is not saved.

    W2 alone of the layers whose covariance it reads; else those of each kind of which the
    hyper-parameters name layers; else W1 and W2, or W2 where they say so, of the layers that
    they name, or of all.
    """
    if run.mode == "batch":
        return 0
    if covered := grid.covariance_layers(config, run):
        return len(covered)
    hparams = grid.hparams_of(config, run)
    if kinds := [layers for name, layers in hparams.items() if name.endswith("_layers")]:
        return sum(map(len, kinds))
    edited = 1 if "layer" in hparams else len(hparams.get("layers") or range(layers))
    return edited * (1 if hparams.get("projections", "both") == "value" else 2)
