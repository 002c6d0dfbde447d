"""The numbers on the page of a results folder, from its metrics files. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from kmebench.evaluation.protocols import METRICS, table_columns
from kmebench.evaluation.score import NEWEST, RUN
from kmebench.modes import DEFAULT
from kmebench.reporting.tables import tied

Labels = Mapping[str, Mapping[str, str]]  # section -> name -> what readers see
#: What readers see of when a model was asked.
WHEN = {
    "final": "after all edits",
    "write": "right after each edit",
    "milestone": "after {edits} edits",
    "newest": f"right after each of the last {NEWEST} of {{edits}} edits",
}
_CELL = ["model", "dataset", "mode", "method"]


def once(metrics: pd.DataFrame) -> pd.DataFrame:
    """Keep the metrics of a run once: of its experiments, that with most methods beside it.

    What a run is behind depends on the others of its experiment.
    """
    place = ["experiment", "model", "dataset", "mode"]
    rivals = metrics.groupby(place)["method"].transform("nunique")
    ordered = metrics.assign(rivals=rivals).sort_values("rivals", ascending=False, kind="stable")
    key = [*RUN, "protocol", "when", "edits_done", "metric"]
    return ordered.drop_duplicates(key).sort_index().drop(columns="rivals")


def in_order(metrics: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """Sort by model, data set, pipeline and method, as the config has them."""
    orders = {
        "model": list(labels["models"]),
        "dataset": list(labels["datasets"]),
        "mode": sorted(set(metrics["mode"])),
        "method": ["original", *labels["methods"]],
    }
    return metrics.sort_values(
        list(orders), kind="stable", key=lambda column: column.map(orders[column.name].index)
    )


def main_cells(
    metrics: pd.DataFrame, labels: Labels, controls: Collection[str], seed: int
) -> pd.DataFrame:
    """One row per model, data set, pipeline and editor: final token metrics, in percent.

    ``metrics`` has the columns of :func:`kmebench.evaluation.score.score_experiment`. Only runs of
    the configured hyper-parameters and ``seed`` count. Columns: model, dataset, mode, editor
    (labels), method, control, n; of every tabled request metric its value, ``_low``, ``_high``; and
    ``tied``: whether its Score is behind the best one's and cannot be told from it. NaN where a
    data set has no prompts for a metric. Empty without any run.
    """
    kept = metrics["protocol"].eq("token") & metrics["when"].eq("final")
    kept &= metrics["variant"].eq(DEFAULT) & metrics["seed"].eq(seed)
    edited = metrics[kept & metrics["method"].ne("original")]
    rows = []
    for names, cell in edited.groupby(_CELL, sort=False):
        row = dict(zip(_CELL, names, strict=True))
        found = cell.set_index("metric")
        for metric in table_columns("request"):
            numbers = found.reindex([metric.name])[["value", "low", "high"]] * metric.scale
            ends = (f"{metric.name}{end}" for end in ("", "_low", "_high"))
            row |= dict(zip(ends, numbers.iloc[0], strict=True))
        scored = "score" in found.index
        row |= {"n": int(found["n"].max()), "tied": scored and tied(found.loc["score"])}
        rows.append(row | {"control": row["method"] in controls})
    return _in_words(pd.DataFrame(rows), labels) if rows else pd.DataFrame()


def explorer(metrics: pd.DataFrame, labels: Labels, seed: int) -> dict[str, Any]:
    """All numbers as lists for the page's own table: names of columns, metrics and rows.

    A row is the texts of its columns, n, and ``[value, low, high]`` (null: not measured) of every
    metric, in its unit, for one run, protocol and time of asking. ``begin`` says what is shown at
    first.
    """
    columns = {"editor": "Editor", "model": "Model", "dataset": "Data set", "mode": "Pipeline"}
    columns |= {"settings": "Hyper-parameters", "protocol": "Protocol", "when": "Asked"}
    shown = [m for m in _ordered() if m.name in set(metrics["metric"])]
    rows = []
    for _, group in metrics.groupby([*RUN, "protocol", "when", "edits_done"], sort=False):
        cell = group.to_dict("records")
        first = cell[0]
        named = _named(first, labels) | {
            "settings": _settings(first, seed),
            "when": WHEN[first["when"]].format(edits=first["edits_done"]),
        }
        found = {row["metric"]: row for row in cell}
        numbers = [_numbers(found.get(metric.name), metric.scale) for metric in shown]
        texts = [named.get(column, first.get(column)) for column in columns]
        rows.append([*texts, max(row["n"] for row in cell), *numbers])
    heads = [[m.name, m.label, f"{m.meaning} ({m.unit})", m.digits] for m in shown]
    begin = dict(zip(columns, rows[0][: len(columns)], strict=True)) | {"editor": ""}
    return {"columns": list(columns.items()), "metrics": heads, "rows": rows, "begin": begin}


def _ordered() -> list[Any]:
    """All metrics, those of tables first and in their order."""
    tabled = [*table_columns("request"), *table_columns("state")]
    return tabled + [m for m in METRICS.values() if m not in tabled]


def _numbers(row: Mapping[str, Any] | None, scale: float) -> list[float | None] | None:
    if row is None or pd.isna(row["value"]):
        return None
    ends = (row[name] for name in ("value", "low", "high"))
    return [None if pd.isna(x) else round(scale * x, 4) for x in ends]


def _settings(row: Mapping[str, Any], seed: int) -> str:
    """The values that tell a run from the configured one."""
    variant = row["variant"].replace("+", ", ")
    return variant if row["seed"] == seed else f"{variant}, seed {row['seed']}"


def _named(row: Mapping[str, Any], labels: Labels) -> dict[str, str]:
    methods = {"original": "Original model", **labels["methods"]}
    return {
        "model": labels["models"][row["model"]],
        "dataset": labels["datasets"][row["dataset"]],
        "editor": methods[row["method"]],
    }


def _in_words(table: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    named: Sequence[dict[str, str]] = [_named(row, labels) for row in table.to_dict("records")]
    return table.assign(**pd.DataFrame(named, index=table.index))
