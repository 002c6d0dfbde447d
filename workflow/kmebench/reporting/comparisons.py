"""Pairs of runs on the same requests, and whether their difference is more than chance."""

from collections.abc import Mapping, Sequence

import pandas as pd

from kmebench.evaluation.protocols import metrics_of
from kmebench.evaluation.score import read_predictions
from kmebench.evaluation.statistics import ENOUGH_EDITS, paired_difference, request_values
from kmebench.reporting.tables import MISSING, markdown_table


def compare(
    pairs: Sequence[Mapping[str, str]],
    files: Mapping[str, str],
    protocol: str,
    statistics: Mapping[str, int],
) -> pd.DataFrame:
    """Compare runs in pairs on their final predictions, in percentage points.

    ``pairs``: name, question, model, dataset and the run folders ``a`` and ``b``; ``files``:
    prediction file of every run folder. Returns one row per pair and metric: difference
    (a − b), low, high (95% paired bootstrap over requests), n: 0, and no numbers, where the data
    set has no prompts that the metric scores.
    """
    values = {}
    for folder, path in files.items():
        frame = read_predictions(path)
        values[folder] = request_values(frame[frame["when"] == "final"], protocol)
    rows = []
    for pair in pairs:
        a, b = values[pair["a"]], values[pair["b"]]
        for metric in metrics_of("request", tabled=True):
            found = paired_difference(a, b, metric.name, **statistics)
            difference, low, high = (metric.scale * x for x in (found.mean, found.low, found.high))
            points = {"difference": difference, "low": low, "high": high}
            rows.append({**pair, "metric": metric.name, **points, "n": found.n})
    return pd.DataFrame(rows)


def comparison_markdown(table: pd.DataFrame, title: str, protocol: str) -> str:
    """Render as one row per pair, model and data set; differences away from zero in bold."""
    n = sorted(table["n"][table["n"] > 0].unique()) or [0]
    edits = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
    caption = (
        f"**{title}. Protocol {protocol}, {edits} edits; A − B in percentage points with 95% "
        "paired bootstrap intervals over edits, in bold where the interval leaves out zero (not "
        "corrected for the number of comparisons)"
    )
    if n[0] < ENOUGH_EDITS:
        caption += f"; none is bold among fewer than {ENOUGH_EDITS} edits"
    if (table["n"] == 0).any():
        caption += f"; {MISSING}: the data set has no such prompts"
    shown = metrics_of("request", tabled=True)
    lines = [["Question", "Model", "Data set", *(metric.label for metric in shown)]]
    keys = ["name", "question", "model", "dataset"]
    for (_, question, model, dataset), rows in table.groupby(keys, sort=False):
        cells = [_cell(rows[rows["metric"] == metric.name].iloc[0]) for metric in shown]
        lines.append([question, model, dataset, *cells])
    return f"{caption}.**\n\n{markdown_table(lines)}\n"


def _cell(row: pd.Series) -> str:
    if not row["n"]:
        return MISSING
    text = f"{row['difference']:+.1f}"
    if row["n"] >= ENOUGH_EDITS and (row["low"] > 0 or row["high"] < 0):
        text = f"**{text}**"
    return f"{text} [{row['low']:+.1f}, {row['high']:+.1f}]"
