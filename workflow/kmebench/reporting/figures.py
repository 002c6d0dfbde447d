"""Figures a paper could show: functions of tidy tables. Imports no torch.

Every function takes a table of ready labels and returns a figure; `figure_tables` makes the
tables from files.
"""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from kmebench.evaluation.protocols import METRICS, Metric, metrics_of
from kmebench.evaluation.statistics import ENOUGH_EDITS, bootstrap
from kmebench.planning.appearance import MARKERS, Style
from kmebench.reporting.figure_tables import OF_THE_NEWEST
from kmebench.reporting.labels import spread
from kmebench.reporting.panels import (
    COLOURS,
    HEIGHT,
    WIDTH,
    Panels,
    edits,
    in_lines,
    legend_below,
    panels,
    seconds_axis,
)

Styles = Mapping[str, Style]


def draw_layers(shares: np.ndarray, title: str) -> Figure:
    """Draw the share of all impact that critical keys and values carry, [L, 2], by layer."""
    layers = np.arange(len(shares))
    figure, axes = plt.subplots(figsize=(2 * WIDTH, HEIGHT))
    for column, label in enumerate(("keys", "values")):
        axes.bar(layers + 0.4 * column - 0.2, 100 * shares[:, column], 0.4, label=label)
    axes.set(xlabel="Layer", ylabel="Share of impact (%)")
    axes.set_title(title, parse_math=False)  # a prompt's dollars are dollars
    axes.set_xlim(-0.7, len(shares) - 0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def time_per_edit(table: pd.DataFrame, styles: Styles) -> Figure:
    """Seconds per edit of every method (the paper's Figure 3): mean with 95% bootstrap interval.

    Columns: model, dataset, editor, seconds; one row per call of the editor. Several models have
    markers of their own.
    """
    datasets, models = (list(dict.fromkeys(table[name])) for name in ("dataset", "model"))
    methods = list(table.groupby("editor")["seconds"].mean().sort_values().index)
    size = (len(datasets) * WIDTH, 1.0 + 0.24 * len(methods))
    figure, grid = plt.subplots(1, len(datasets), figsize=size, sharex=True, sharey=True)
    for axes, dataset in zip(np.atleast_1d(grid), datasets, strict=True):
        calls = table[table["dataset"] == dataset].groupby(["editor", "model"], sort=False)
        for (method, model), seconds in calls["seconds"]:
            k = models.index(model)
            mean, low, high = bootstrap(seconds.to_numpy(), resamples=1000, seed=0)
            y = methods.index(method) + 0.3 * ((k + 0.5) / len(models) - 0.5)
            bar = [[mean - low], [high - mean]]
            style = {"fmt": MARKERS[k], "color": styles[method].colour, "elinewidth": 1.0}
            axes.errorbar(mean, y, xerr=bar, **style)
        axes.set(xscale="log", xlabel="Seconds per edit", ylim=(len(methods), -1))
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(f"{dataset} · {edits(table[table['dataset'] == dataset])}")
        seconds_axis(axes)
    if len(models) > 1:
        marks = [Line2D([], [], color="0.4", marker=m, ls="none") for m in MARKERS[: len(models)]]
        figure.legend(marks, models, loc="outside lower center", ncols=4)
    return figure


def node_importance(table: pd.DataFrame) -> Figure:
    """Importance of each node of T+ across the layers (the paper's Figure 4).

    Columns: model, dataset, layer, matrix (key | value), rank, importance, low, high: share of the
    impact of T+ in percent, mean over requests with its interval.
    """
    figure, drawn = panels(table, "model", "dataset", sharex=False, wide=1.5)
    for axes, part in drawn:
        for offset, (matrix, nodes) in zip((-0.15, 0.15), part.groupby("matrix"), strict=False):
            colour = COLOURS[0] if matrix == "key" else COLOURS[1]
            x = nodes["layer"] + offset
            bars = (nodes["importance"] - nodes["low"], nodes["high"] - nodes["importance"])
            style = {"fmt": "o" if matrix == "key" else "s", "ms": 2.2, "lw": 0.5, "capsize": 0}
            axes.errorbar(x, nodes["importance"], bars, color=colour, alpha=0.6, **style)
            mean = nodes.groupby("layer")["importance"].mean()
            label = "keys" if matrix == "key" else "values"
            axes.plot(mean.index, mean, color=colour, label=f"{label}, mean of the layer")
        axes.set(xlabel="Layer", ylabel="Share of the impact of T+ (%)", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


def sweep(table: pd.DataFrame, parameter: str) -> Figure:
    """Metrics against one hyper-parameter (Figures 5 and 6, negative paths, scores, seeds).

    Columns: model, dataset, value (of ``parameter``), metric, mean, low, high (percent).
    """
    figure, drawn = panels(table, "model", "dataset", sharey=True)
    swept = list(dict.fromkeys(table["value"]))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in swept)
    swept = sorted(swept) if numbers else swept
    metrics = [metric.label for metric in metrics_of("request", tabled=True)]
    for axes, part in drawn:
        for index, label in enumerate(metrics):
            points = part[part["metric"] == label].set_index("value").reindex(swept)
            x = np.arange(len(swept)) + 0.06 * (index - 1.5)
            style = Style(COLOURS[index], MARKERS[index])
            _line(axes, x, points, style, label, linestyle="-" if numbers else "none")
        axes.set(xlabel=parameter, ylabel="Percent", ylim=(-4, 104))
        axes.set_xticks(range(len(swept)), [str(v) for v in swept])
    legend_below(figure, drawn[0][0], 4)
    return figure


def by_layer(table: pd.DataFrame, what: str) -> Figure:
    """In which layers ``what`` lies: one row per record, above them the mean.

    Columns: model, dataset, record, layer, share in percent. Records are sorted by the layer in
    which half of their share has come together.
    """
    figure, drawn = panels(table, "model", "dataset", sharex=False, high=1.2)
    limit = table["share"].quantile(0.99)
    means = table.groupby(["model", "dataset", "layer"])["share"].mean()
    for axes, part in drawn:
        grid = part.pivot(index="record", columns="layer", values="share").to_numpy()
        half = (grid.cumsum(axis=1) < grid.sum(axis=1, keepdims=True) / 2).sum(axis=1)
        records = grid[np.argsort(half, kind="stable")]
        image = axes.imshow(records, aspect="auto", cmap="cividis", vmin=0, vmax=limit)
        axes.set(xlabel="Layer", ylabel=f"{len(grid)} records", yticks=[])
        axes.grid(visible=False)
        above = axes.inset_axes((0, 1.03, 1, 0.25), sharex=axes)
        above.bar(range(grid.shape[1]), grid.mean(axis=0), 0.8, color="0.45")
        above.tick_params(labelbottom=False)
        above.set(ylabel="Mean (%)", ylim=(0, 1.05 * means.max()))
        above.set_title(axes.get_title(loc="left"))
        axes.set_title("", loc="left")
    bar = figure.colorbar(image, ax=[axes for axes, _ in drawn], extend="max", pad=0.02)
    bar.set_label(f"Share of {what} (%)")
    return figure


def along_edits(table: pd.DataFrame, styles: Styles) -> Figure:
    """Metrics against the number of consecutive edits made, a panel for each and each cell.

    Columns: cell, editor, edits_done, metric, mean, low, high (in the metric's unit), source
    (here | paper). A point after k edits is of those k edits, or of the newest. Names stand at the
    ends of the lines; the paper's numbers are hollow marks.
    """
    by_label = {metric.label: metric for metric in METRICS.values()}
    alone = table["cell"].nunique() == 1  # a column of panels would be long
    if alone:
        figure, every = in_lines(table, "metric", "cell")
    else:
        figure, every = panels(table, "metric", "cell", sharey="row")
    drawn = [(axes, part[part["source"] == "here"]) for axes, part in every]
    for axes, part in every:
        for (method, source), points in part.groupby(["editor", "source"], sort=False):
            points = points.sort_values("edits_done")
            if source == "here":
                _line(axes, points["edits_done"], points, styles[method], method)
            else:
                _hollow(axes, points, styles[method])
        axes.set(xscale="log", xlabel="Edits made and asked")
        left, right = axes.get_xlim()
        axes.axvspan(left, min(ENOUGH_EDITS, right), color="0.96", linewidth=0, zorder=0)
        axes.set_xlim(left, right)
        _scale(axes, by_label[part["metric"].iloc[0].removesuffix(OF_THE_NEWEST)])
        done = sorted(part["edits_done"].unique())
        axes.set_xticks(done, [str(n) for n in done])
        axes.minorticks_off()
        if not alone:
            axes.label_outer()
    _name_ends(figure, drawn, styles)
    return figure


def _hollow(axes: Axes, points: pd.DataFrame, style: Style) -> None:
    """Mark the paper's numbers, with the range over its models."""
    bars = (points["mean"] - points["low"], points["high"] - points["mean"])
    look = {"fmt": style.marker, "color": style.colour, "mfc": "white", "lw": 0.7, "alpha": 0.8}
    axes.errorbar(points["edits_done"], points["mean"], bars, **look)


def _name_ends(figure: Figure, drawn: Panels, styles: Styles) -> None:
    """Write the name of every method at the end of its line, without overlaps."""
    line = {"arrowstyle": "-", "color": "0.7", "lw": 0.4, "shrinkA": 0, "shrinkB": 3}
    text = {"textcoords": "offset points", "fontsize": 7, "va": "center", "arrowprops": line}
    notes = []
    for axes, part in drawn:
        ends = part.sort_values("edits_done", kind="stable").groupby("editor", sort=False).last()
        places = zip(ends.index, ends["edits_done"], ends["mean"], strict=True)
        notes.append(
            [
                axes.annotate(method, at, (12, 0), color=styles[method].colour, **text)
                for method, *at in places
            ]
        )
    figure.draw_without_rendering()  # the layout makes room for names, and decides where lines end
    figure.set_layout_engine("none")
    points = 72 / figure.dpi  # of a pixel
    for (axes, _), names in zip(drawn, notes, strict=True):
        ends = axes.transData.transform([note.xy for note in names])[:, 1] * points
        low, high = axes.bbox.y0 * points, axes.bbox.y1 * points
        for note, offset in zip(names, spread(ends, 8, low, high) - ends, strict=True):
            note.xyann = (12, offset)


def _scale(axes: Axes, metric: Metric) -> None:
    """Name and scale the axis of a metric: percent from 0 to 100, ratios by logarithm."""
    axes.set_ylabel(metric.unit.capitalize())
    if metric.unit == "percent":
        axes.set_ylim(-4, 104)
    if metric.unit == "ratio":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")


def paper_scatter(table: pd.DataFrame) -> Figure:
    """The paper's numbers against ours, with the diagonal; 95% intervals of ours.

    Columns: table, dataset, editor, metric, mean, low, high, paper (percent).
    """
    figure, drawn = panels(table, "table", "dataset", sharey=True)
    for axes, part in drawn:
        axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=1)
        for index, (label, points) in enumerate(part.groupby("metric", sort=False)):
            bars = (points["mean"] - points["low"], points["high"] - points["mean"])
            style = {"fmt": MARKERS[index], "color": COLOURS[index], "lw": 0.7}
            axes.errorbar(points["paper"], points["mean"], bars, label=label, **style)
        for row in part[part["metric"] == "Score"].to_dict("records"):
            place = (row["paper"], row["mean"])
            axes.annotate(row["editor"], place, (3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="Paper (%)", ylabel="Here (%)", xlim=(-4, 104), ylim=(-4, 104))
    legend_below(figure, drawn[0][0], 4)
    return figure


def weight_norms(table: pd.DataFrame) -> Figure:
    """Where editors write: Frobenius norm of an edit by layer, median over edits.

    Columns: model, dataset, editor, layer, norm; one row per call, layer and editor.
    """
    figure, drawn = panels(table, "model", "dataset", sharex=False, wide=1.5)
    positive = table["norm"][table["norm"] > 0]
    scale = LogNorm(positive.min(), positive.max())
    methods = list(dict.fromkeys(table["editor"]))
    for axes, part in drawn:
        median = part.groupby(["editor", "layer"])["norm"].median().unstack("layer")
        layers = range(int(part["layer"].max()) + 1)
        grid = median.reindex(index=methods, columns=layers)
        sns.heatmap(
            grid[grid > 0],
            norm=scale,
            cmap="cividis",
            ax=axes,
            cbar_kws={"label": "‖ΔW‖ per edit"},
            xticklabels=max(1, len(layers) // 10),
        )
        axes.set(xlabel="Layer", ylabel="")
        axes.tick_params(axis="x", rotation=0)
        axes.grid(visible=False)
    return figure


def paired_matrix(table: pd.DataFrame) -> Figure:
    """Every method (row) minus every later one (column) on the same requests.

    Columns: model, dataset, a, b, difference, low, high (percentage points); one row per pair,
    a before b. Cells whose 95% interval contains zero have no colour.
    """
    methods = list(dict.fromkeys([*table["a"], *table["b"]]))
    rows, columns = methods[:-1], methods[1:]
    down, across = (list(dict.fromkeys(table[name])) for name in ("model", "dataset"))
    size = (len(across) * (1.2 + 0.8 * len(columns)), len(down) * (0.8 + 0.4 * len(rows)))
    figure, grid = plt.subplots(len(down), len(across), figsize=size, squeeze=False)
    limit = max(float(table["difference"].abs().max()), 1.0)
    for axes, (model, dataset) in zip(grid.flat, itertools.product(down, across), strict=True):
        part = table[(table["model"] == model) & (table["dataset"] == dataset)]
        clear = (part["low"] > 0) | (part["high"] < 0)
        numbers = part[["difference", "low", "high"]].itertuples(index=False)
        part = part.assign(
            colour=part["difference"].where(clear, 0.0),
            note=[f"{n.difference:+.1f}\n[{n.low:+.1f}, {n.high:+.1f}]" for n in numbers],
        )
        colour, note = (
            part.pivot(index="a", columns="b", values=name).reindex(index=rows, columns=columns)
            for name in ("colour", "note")
        )
        sns.heatmap(
            colour,
            cmap="PuOr",
            vmin=-limit,
            vmax=limit,
            annot=note.fillna(""),
            fmt="",
            annot_kws={"fontsize": 7},
            linewidths=0.5,
            cbar_kws={"label": "Row - column (points)"},
            ax=axes,
        )
        axes.set(xlabel="", ylabel="", title=f"{model}, {dataset}")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(visible=False)
    return figure


def _line(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    points: pd.DataFrame,
    style: Style,
    label: str,
    linestyle: str = "-",
) -> None:
    """A line with intervals."""
    bars = (points["mean"] - points["low"], points["high"] - points["mean"])
    axes.errorbar(
        x,
        points["mean"],
        bars,
        color=style.colour,
        marker=style.marker,
        linestyle=linestyle,
        ecolor=(style.colour, 0.4),
        elinewidth=0.7,
        markeredgecolor="white",
        markeredgewidth=0.4,
        label=label,
    )
