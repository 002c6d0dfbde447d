"""The tables behind the figures, from the files of finished runs. Imports no torch.

Runs are mappings with the columns of a run (model, dataset, mode, method, variant, seed) and with
``value``, the value a sweep gives it; ``labels`` maps section -> name -> what readers see.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import HEALTH, METRICS, metrics_of
from kmebench.evaluation.score import NEWEST, RUN
from kmebench.evaluation.statistics import bootstrap
from kmebench.io.checked_files import read_json, read_parquet, trusted
from kmebench.modes import in_turns, split_mode
from kmebench.reporting.paper import PAPER_EDITS, REPORTED

Runs = Sequence[Mapping[str, Any]]
Labels = Mapping[str, Mapping[str, str]]
#: Behind the name of a metric of what was written last.
OF_THE_NEWEST = f", newest {NEWEST}"
LAYER = re.compile(r"\.(\d+)\.")


def times(files: Sequence[str], runs: Runs, labels: Labels) -> pd.DataFrame:
    """Seconds per request of every call of the editors, from timing.json files."""
    rows = []
    for path, run in zip(files, runs, strict=True):
        calls = read_json(path)["calls"]
        row = _named(run, labels) | {"n": sum(call["requests"] for call in calls)}
        for call in calls:
            rows.append(row | {"seconds": sum(call["seconds"].values()) / call["requests"]})
    return pd.DataFrame(rows)


def norms(files: Sequence[str], runs: Runs, labels: Labels) -> pd.DataFrame:
    """Frobenius norm of every edit in every layer, from norms.parquet files.

    ``n``: the requests of the calls that changed a layer.

    Raises:
        KMEBenchError: none did.
    """
    parts = []
    for path, run in zip(files, runs, strict=True):
        squares = _squares(path)
        n = int(squares.drop_duplicates("call")["requests"].sum())
        named = _named(run, labels) | {"n": n}
        table = squares.assign(norm=squares["square"] ** 0.5, **named)
        parts.append(table[[*named, "layer", "norm"]])
    return _of_changes(parts)


def edit_layers(files: Sequence[str], runs: Runs, labels: Labels) -> pd.DataFrame:
    """Share of every layer in the squared norm of every edit, in percent, from norms.parquet files.

    Edits that changed no layer are left out.

    Raises:
        KMEBenchError: none changed any.
    """
    parts = []
    for path, run in zip(files, runs, strict=True):
        squares = _squares(path).pivot(index="call", columns="layer", values="square")
        depth = 1 + max(squares.columns, default=0)
        squares = squares.reindex(columns=range(depth)).fillna(0.0)
        changed = squares[squares.sum(axis=1) > 0]
        shares = 100 * changed.div(changed.sum(axis=1), axis=0)
        n = len(shares)
        table = shares.melt(ignore_index=False, var_name="layer", value_name="share")
        table = table.rename_axis("record").reset_index()
        parts.append(table.assign(**_named(run, labels), n=n))
    return with_cells(_of_changes(parts))


def _of_changes(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not any(map(len, parts)):
        raise KMEBenchError(
            "No edit of this figure changed a layer: give its experiment an editor of weights, or "
            "set the figure to null in the config."
        )
    return pd.concat(parts, ignore_index=True)


def _squares(path: str) -> pd.DataFrame:
    """Return call, requests, layer and square: the squared norm of what a call changed there."""
    norms = read_parquet(path)
    # An embedding or a head is in no layer.
    layer = pd.to_numeric(norms["parameter"].str.extract(LAYER, expand=False))
    norms = norms.assign(layer=layer, square=norms["norm"].astype(float) ** 2)
    norms = norms.dropna(subset=["layer"]).astype({"layer": int})
    return norms.groupby(["call", "requests", "layer"], as_index=False)["square"].sum()


def swept(metrics: pd.DataFrame, runs: Runs, labels: Labels, protocol: str) -> pd.DataFrame:
    """Final metrics of every run of a sweep, in percent, with the value that it was given."""
    final = metrics[(metrics["when"] == "final") & (metrics["protocol"] == protocol)]
    joined = pd.DataFrame(list(runs)).merge(_in_units(final), on=RUN, validate="1:m")
    columns = ["model", "dataset", "editor", "value", "metric", "mean", "low", "high", "n"]
    listed = joined["value"].map(lambda x: ", ".join(map(str, x)) if isinstance(x, list) else x)
    return _labelled(joined.assign(value=listed), labels)[columns]


def trade_offs(
    files: Sequence[str], runs: Runs, labels: Labels, protocol: str, controls: Collection[str]
) -> pd.DataFrame:
    """One row per editor, data set and pipeline: what its final model can do, and what it took.

    Of the metrics of several experiments the given runs count. Returns pipeline, cell (data set,
    with the model where there are several), editor, control (whether it edits nothing), seconds
    (per edit), n, and every tabled metric of requests by its label with ``_low`` and ``_high``: NaN
    where no data set has prompts for it.
    """
    metrics = pd.concat([read_parquet(path) for path in files], ignore_index=True)
    tabled = [metric.name for metric in metrics_of("request", tabled=True)]
    shown = metrics["metric"].isin(tabled)
    shown &= (metrics["when"] == "final") & (metrics["protocol"] == protocol)
    joined = pd.DataFrame(list(runs)).merge(_in_units(metrics[shown]), on=RUN, validate="1:m")
    rows = []
    for _, part in joined.groupby(RUN, sort=False):
        run = part.iloc[0]
        row: dict[str, Any] = {"pipeline": pipeline_label(run["mode"])} | _named(run, labels)
        row |= {"control": run["method"] in controls}
        row |= {"seconds": run["seconds_per_edit"], "n": int(part["n"].max())}
        for found in part.to_dict("records"):
            label = METRICS[found["metric"]].label
            row |= {label: found["mean"]}
            row |= {f"{label}_{end}": found[end] for end in ("low", "high")}
        rows.append(row)
    table = pd.DataFrame(rows)
    ends = [f"{METRICS[m].label}{end}" for m in tabled for end in ("", "_low", "_high")]
    return with_cells(table.reindex(columns=list(dict.fromkeys([*table.columns, *ends]))))


def with_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``cell``: the data set, with the model where there are several."""
    several = table["model"].nunique() > 1
    return table.assign(
        cell=table["model"] + ", " + table["dataset"] if several else table["dataset"]
    )


def pipeline_label(mode: str) -> str:
    """Return what readers see of a mode."""
    pipeline, _ = split_mode(mode)
    return f"{pipeline.replace('_', '-').capitalize()} editing{in_turns(mode)}"


def survival(metrics: pd.DataFrame, labels: Labels, protocol: str) -> pd.DataFrame:
    """Tabled metrics after 1, 3, 10, ... and all consecutive edits, in their units.

    Those of requests are of all requests so far; of long runs the Efficacy of the newest comes
    behind them, and those of states at the end.
    """
    tabled = [*metrics_of("request", tabled=True), *metrics_of("state", tabled=True)]
    newest = (metrics["when"] == "newest") & (metrics["metric"] == "efficacy")
    kept = newest | metrics["when"].isin(["milestone", "final"])
    kept &= metrics["metric"].isin([metric.name for metric in tabled])
    kept &= metrics["protocol"].isin([protocol, HEALTH])
    edited = metrics[kept & (metrics["method"] != "original")]
    order = edited["method"].map({name: k for k, name in enumerate(labels["methods"])})
    part = 2 * (edited["protocol"] == HEALTH) + (edited["when"] == "newest")
    ordered = edited.assign(part=part, order=order).sort_values(["part", "order"], kind="stable")
    table = _labelled(_in_units(ordered), labels)
    table["metric"] += np.where(table["part"] == 1, OF_THE_NEWEST, "")
    columns = ["model", "dataset", "editor", "edits_done", "metric", "mean", "low", "high"]
    return with_cells(table[columns]).assign(source="here")


def published_ends(
    paper: pd.DataFrame,
    metrics: pd.DataFrame,
    labels: Labels,
    paper_names: Mapping[str, Mapping[str, str | None]],
) -> pd.DataFrame:
    """Return the paper's numbers of the editors and data sets of :func:`survival`, as it does.

    A number is the mean over the paper's models, ``low`` and ``high`` the least and the greatest.
    """
    shown = metrics[(metrics["method"] != "original") & metrics["metric"].isin(REPORTED)]
    rows = []
    named = shown[["model", "dataset", "method", "metric"]].drop_duplicates()
    for cell in named.to_dict("records"):
        words = [paper_names[f"{kind}s"].get(cell[kind]) for kind in ("dataset", "method")]
        of_cell = paper[(paper[["dataset", "editor"]] == words).all(axis=1)]
        values = of_cell[cell["metric"]].dropna()
        if len(values):
            ends = {"mean": values.mean(), "low": values.min(), "high": values.max()}
            rows.append(cell | ends | {"edits_done": PAPER_EDITS})
    if not rows:
        return pd.DataFrame()
    columns = ["model", "dataset", "editor", "edits_done", "metric", "mean", "low", "high"]
    return with_cells(_labelled(pd.DataFrame(rows), labels)[columns]).assign(source="paper")


def against_paper(tables: Mapping[str, pd.DataFrame], labels: Labels) -> pd.DataFrame:
    """Our numbers beside the paper's, where both exist; ``tables``: title -> wide table."""
    rows = []
    for title, wide in tables.items():
        for row in wide[wide["editor"] != "original"].to_dict("records"):
            named = _named(row | {"method": row["editor"]}, labels) | {"table": title}
            for metric in metrics_of("request", tabled=True):
                numbers = {
                    "n": row["n"],
                    "mean": row[metric.name],
                    "low": row[f"{metric.name}_low"],
                    "high": row[f"{metric.name}_high"],
                    "paper": row[f"{metric.name}_paper"],
                }
                if not np.isnan([numbers["mean"], numbers["paper"]]).any():
                    rows.append(named | {"metric": metric.label} | numbers)
    columns = ["table", "model", "dataset", "editor", "n", "metric", "mean", "low", "high", "paper"]
    return pd.DataFrame(rows, columns=columns)


def importance(path: str | Path, *, resamples: int, seed: int) -> pd.DataFrame:
    """Share of every node in the impact of T+, in percent, from a path file.

    Shares are taken within each request, then averaged over requests, with 95% bootstrap
    intervals. Returns layer, matrix (key | value), rank (1 is the best), importance, low, high, n.
    """
    shares = node_shares(path)
    flat = shares.reshape(len(shares), -1)
    mean, low, high = bootstrap(flat, resamples=resamples, seed=seed)
    layer, matrix, rank = (index.ravel() for index in np.indices(shares.shape[1:]))
    return pd.DataFrame(
        {
            "layer": layer,
            "matrix": np.array(["key", "value"])[matrix],
            "rank": rank + 1,
            "importance": mean,
            "low": low,
            "high": high,
            "n": len(shares),
        }
    )


def layer_shares(path: str | Path) -> np.ndarray:
    """Share of every layer in the impact of T+, in percent, [G, L], from a path file."""
    return node_shares(path).sum(axis=(2, 3))


def node_shares(path: str | Path) -> np.ndarray:
    """Share of every node within its group of requests, [G, L, 2, N]; signs do not count."""
    with trusted(path):
        scores = np.abs(load_file(path)["positive_scores"].astype(np.float64))
    return 100 * scores / scores.sum(axis=(1, 2, 3), keepdims=True)


def nodes(files: Sequence[str], runs: Runs, labels: Labels) -> pd.DataFrame:
    """Importance of the nodes of T+ for every model and data set, from files of its rule."""
    parts = [
        read_parquet(path).assign(**_named(run, labels))
        for path, run in zip(files, runs, strict=True)
    ]
    return _together(parts)


def layers(files: Sequence[str], runs: Runs, labels: Labels) -> pd.DataFrame:
    """Share of every layer in the impact of T+ of every record, in percent, from path files."""
    parts = []
    for path, run in zip(files, runs, strict=True):
        shares = layer_shares(path)
        record, layer = (index.ravel() for index in np.indices(shares.shape))
        columns = {"record": record, "layer": layer, "share": shares.ravel()}
        parts.append(pd.DataFrame(columns).assign(n=len(shares), **_named(run, labels)))
    return with_cells(_together(parts))


def _together(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the tables of runs with critical paths.

    Raises:
        KMEBenchError: there is none.
    """
    if not parts:
        raise KMEBenchError(
            "No run of this figure has critical paths: give its experiment an editor with paths "
            "(pac), or set the figure to null in the config."
        )
    return pd.concat(parts, ignore_index=True)


def _named(run: Mapping[str, Any], labels: Labels) -> dict[str, str]:
    return {
        "model": labels["models"][run["model"]],
        "dataset": labels["datasets"][run["dataset"]],
        "editor": labels["methods"][run["method"]],
    }


def _labelled(table: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    return table.assign(
        model=table["model"].map(labels["models"]),
        dataset=table["dataset"].map(labels["datasets"]),
        editor=table["method"].map(labels["methods"]),
        metric=table["metric"].map(lambda name: METRICS[name].label),
    )


def _in_units(metrics: pd.DataFrame) -> pd.DataFrame:
    """Scale values to their units, and rename ``value``, which a sweep's value is called too."""
    scale = metrics["metric"].map(lambda name: METRICS[name].scale)
    shown = metrics[["value", "low", "high"]].mul(scale, axis=0)
    columns = shown.rename(columns={"value": "mean"})
    return metrics.drop(columns=["value", "low", "high"]).join(columns)
