"""Do the paper's findings appear as models grow? Imports no torch.

One editor is set against the best of the others (that of the highest Score on the same model, data
set and pipeline), here and in the paper.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kmebench.errors import DataError
from kmebench.evaluation.protocols import METRICS
from kmebench.modes import DEFAULT
from kmebench.planning.appearance import Style
from kmebench.reporting.figure_tables import Labels, pipeline_label
from kmebench.reporting.panels import legend_below, panels
from kmebench.reporting.paper import ORIGINAL

SHOWN = ("locality", "generality", "score")
BEST = "best of the others"
_BILLIONS = re.compile(r"\((\d+(?:\.\d+)?)B\)")
_OTHERS = Style("0.35", "s")


def sizes_table(
    tables: Sequence[tuple[pd.DataFrame, pd.DataFrame | None]],
    labels: Labels,
    parameters: Mapping[str, int],
    method: str,
    paper_names: Mapping[str, Mapping[str, str | None]],
    controls: Collection[str],
) -> pd.DataFrame:
    """Locality, Generality and Score of ``method`` and of the best of the others, by model size.

    Args:
        tables: pairs of a table of ours and the paper's, or None.
        labels: section -> name -> what readers see.
        parameters: of every model of ours.
        method: the one that is set against the others.
        paper_names: section (datasets, methods) -> name -> the paper's word for it.
        controls: methods that edit nothing.

    Returns pipeline, dataset, cell, source (here | paper), series (the label of ``method`` or
    :data:`BEST`), model, editor, billions (parameters / 1e9), n, metric, mean, low, high: percent.
    A cell counts where it has ``method`` and others, and a variant where it is the default.
    """
    rows: list[dict[str, Any]] = []
    own = labels["methods"][method]
    for ours, paper in tables:
        about = {"pipeline": pipeline_label(ours["mode"].iloc[0]), "source": "here"}
        edited = ours[~ours["editor"].isin({"original", *controls})]
        for row, series in _pairs(edited[edited["variant"] == DEFAULT], method, own):
            names = {column: labels[f"{column}s"][row[column]] for column in ("model", "dataset")}
            names |= {"editor": labels["methods"][row["editor"]], "series": series}
            rows += _metrics(row, about | names | {"billions": parameters[row["model"]] / 1e9})
        if paper is None:
            continue
        here = {paper_names["datasets"].get(name): name for name in ours["dataset"]}
        known = paper[paper["dataset"].isin(here) & (paper["editor"] != ORIGINAL)]
        about["source"] = "paper"
        for row, series in _pairs(known, paper_names["methods"].get(method), own):
            names = {"model": row["model"], "dataset": labels["datasets"][here[row["dataset"]]]}
            names |= {"editor": own if series == own else row["editor"], "series": series}
            rows += _metrics(row, about | names | {"billions": _billions(row["model"])})
    # Tables of ours may be set against the same one of the paper's: its rows count once.
    table = pd.DataFrame(rows).drop_duplicates(ignore_index=True)
    return table.assign(cell=table["dataset"] + ", " + table["pipeline"]) if rows else table


def _pairs(
    table: pd.DataFrame, method: str | None, series: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a method and of the best of the others, by model and data set."""
    scored = table.dropna(subset="score")
    for _, cell in scored.groupby(["model", "dataset"], sort=False):
        own, others = cell[cell["editor"] == method], cell[cell["editor"] != method]
        if len(own) == 1 and len(others):
            yield own.iloc[0].to_dict(), series
            yield others.loc[others["score"].idxmax()].to_dict(), BEST


def _billions(model: str) -> float:
    """Read the size off a name of the paper's: "GPT-J (6B)".

    Raises:
        DataError: there is none in it.
    """
    found = _BILLIONS.search(model)
    if found is None:
        raise DataError(f"The paper's table names {model!r} without its size, as in 'GPT-J (6B)'.")
    return float(found[1])


def _metrics(row: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per shown metric; the paper has neither edits nor intervals."""
    return [
        {
            **about,
            "n": row.get("n", np.nan),
            "metric": METRICS[name].label,
            "mean": row[name],
            "low": row.get(f"{name}_low", np.nan),
            "high": row.get(f"{name}_high", np.nan),
        }
        for name in SHOWN
    ]


def against_size(table: pd.DataFrame, styles: Mapping[str, Style]) -> Figure:
    """Metrics against model size: a method and the best of the others, the paper's hollow.

    Sizes stand in order, at equal distances. The name above a grey mark says which method is the
    best of the others.
    """
    sizes = sorted(table["billions"].unique())
    table = table.assign(place=table["billions"].map(sizes.index))
    names = {}
    for (source, series), points in table.groupby(["source", "series"]):
        methods = points["editor"].unique()  # the best of the others may be one everywhere
        names[source, series] = methods[0] if len(methods) == 1 else series
    figure, drawn = panels(table, "metric", "cell", sharex=True, sharey=True, high=0.9)
    for axes, part in drawn:
        for (source, series), points in part.groupby(["source", "series"], sort=False):
            style = styles.get(series, _OTHERS)
            _series(axes, points.sort_values("place"), style, f"{names[source, series]}, {source}")
        axes.set_xticks(range(len(sizes)), [_parameters(size) for size in sizes])
        axes.set(xlabel="Parameters", ylabel="Percent", ylim=(-6, 112))
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.label_outer()
    legend_below(figure, drawn[0][0], 4)
    return figure


def _series(axes: Axes, points: pd.DataFrame, style: Style, label: str) -> None:
    """Draw one line with intervals; name the editors that are the best of the others."""
    here = points["source"].iloc[0] == "here"
    bars = (points["mean"] - points["low"], points["high"] - points["mean"])
    axes.errorbar(
        points["place"],
        points["mean"],
        bars if here else None,
        color=style.colour,
        marker=style.marker,
        linestyle="-" if here else ":",
        markerfacecolor=style.colour if here else "white",
        elinewidth=0.7,
        label=label,
    )
    if style is _OTHERS:
        tops = points["high"].fillna(points["mean"])
        for x, y, name in zip(points["place"], tops, points["editor"], strict=True):
            text = {"textcoords": "offset points", "fontsize": 6, "ha": "center", "color": "0.35"}
            axes.annotate(name, (x, y), (0, 4), **text)


def _parameters(billions: float) -> str:
    return f"{billions:.2g}B" if billions >= 1 else f"{1000 * billions:.3g}M"
