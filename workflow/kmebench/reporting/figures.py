"""Figures a paper could show: functions of tidy tables. Imports no torch.

Every function takes a table of ready labels and returns a figure; `figure_tables` makes the
tables from files.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from kmebench.errors import KMEBenchError
from kmebench.evaluation.protocols import METRICS, Metric, metrics_of
from kmebench.io.files import atomic_path

plt.style.use(Path(__file__).with_name("kmebench.mplstyle"))
COLOURS: list[str] = plt.rcParams["axes.prop_cycle"].by_key()["color"]
MARKERS = "osD^vPX*<>hp"
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 3.4, 2.5  # of one panel, inches


def save(figure: Figure, *paths: str | Path) -> None:
    """Write a figure under several names; the ending decides the format. No dates inside."""
    for path in map(Path, paths):
        kind = path.suffix.removeprefix(".") or "png"
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
    plt.close(figure)


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


def time_per_edit(table: pd.DataFrame) -> Figure:
    """Seconds per edit of every editor (the paper's Figure 3): mean with 95% bootstrap interval.

    Columns: model, dataset, editor, seconds; one row per call of the editor.
    """
    datasets = table["dataset"].unique()
    editors = table.groupby("editor")["seconds"].mean().sort_values().index
    size = (len(datasets) * WIDTH, 1.0 + 0.24 * len(editors))
    figure, panels = plt.subplots(1, len(datasets), figsize=size, sharex=True, sharey=True)
    models = table["model"].unique()
    for axes, dataset in zip(np.atleast_1d(panels), datasets, strict=True):
        sns.pointplot(
            table[table["dataset"] == dataset],
            x="seconds",
            y="editor",
            hue="model",
            order=editors,
            hue_order=models,
            palette=COLOURS[: len(models)],
            markers=list(MARKERS[: len(models)]),
            linestyle="none",
            dodge=0.3 if len(models) > 1 else False,
            errorbar=("ci", 95),
            seed=0,
            err_kws={"linewidth": 1.0},
            markersize=4,
            ax=axes,
        )
        axes.set(xscale="log", xlabel="Seconds per edit", ylabel="", title=dataset)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.get_legend().remove()
    if len(models) > 1:
        _legend_below(figure, axes, 4)
    return figure


def node_importance(table: pd.DataFrame) -> Figure:
    """Importance of each node of T+ across the layers (the paper's Figure 4).

    Columns: model, dataset, layer, matrix (key | value), rank, importance, low, high: share of the
    impact of T+ in percent, mean over requests with its interval.
    """
    figure, panels = _panels(table, "model", "dataset", sharex=False, wide=1.5)
    for axes, part in panels:
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

    Columns: model, dataset, value, metric, mean, low, high (percent).
    """
    figure, panels = _panels(table, "model", "dataset", sharey=True)
    values = list(dict.fromkeys(table["value"]))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numbers else values
    labels = [metric.label for metric in metrics_of("request", tabled=True)]
    for axes, part in panels:
        for index, metric in enumerate(labels):
            points = part[part["metric"] == metric].set_index("value").reindex(values)
            x = np.arange(len(values)) + 0.06 * (index - 1.5)
            _line(axes, x, points, index, metric, linestyle="-" if numbers else "none")
        axes.set(xlabel=parameter, ylabel="Percent", ylim=(-4, 104))
        axes.set_xticks(range(len(values)), [str(v) for v in values])
    _legend_below(figure, panels[0][0], 4)
    return figure


def along_edits(table: pd.DataFrame) -> Figure:
    """Metrics against the number of consecutive edits made, one row of panels for each.

    Columns: model, dataset, editor, edits_done, metric, mean, low, high (in the metric's unit).
    """
    table = table.assign(cell=table["model"] + "\n" + table["dataset"])
    editors = list(dict.fromkeys(table["editor"]))
    by_label = {metric.label: metric for metric in METRICS.values()}
    figure, panels = _panels(table, "metric", "cell", sharey="row")
    for axes, part in panels:
        for index, editor in enumerate(editors):
            points = part[part["editor"] == editor].sort_values("edits_done")
            _line(axes, points["edits_done"], points, index, editor)
        axes.set(xscale="log", xlabel="Edits")
        _scale(axes, by_label[part["metric"].iloc[0]])
        done = sorted(part["edits_done"].unique())
        axes.set_xticks(done, [str(n) for n in done])
        axes.minorticks_off()
    _legend_below(figure, panels[0][0], 6)
    return figure


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
    figure, panels = _panels(table, "table", "dataset", sharey=True)
    for axes, part in panels:
        axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=1)
        for index, (metric, points) in enumerate(part.groupby("metric", sort=False)):
            bars = (points["mean"] - points["low"], points["high"] - points["mean"])
            style = {"fmt": MARKERS[index], "color": COLOURS[index], "lw": 0.7}
            axes.errorbar(points["paper"], points["mean"], bars, label=metric, **style)
        for row in part[part["metric"] == "Score"].to_dict("records"):
            place = (row["paper"], row["mean"])
            axes.annotate(
                row["editor"], place, (3, 3), textcoords="offset points", fontsize="x-small"
            )
        axes.set(xlabel="Paper (%)", ylabel="Here (%)", xlim=(-4, 104), ylim=(-4, 104))
    _legend_below(figure, panels[0][0], 4)
    return figure


def weight_norms(table: pd.DataFrame) -> Figure:
    """Where editors write: Frobenius norm of an edit by layer, median over edits.

    Columns: model, dataset, editor, layer, norm; one row per call, layer and editor.
    """
    figure, panels = _panels(table, "model", "dataset", sharex=False, wide=1.5)
    positive = table["norm"][table["norm"] > 0]
    scale = LogNorm(positive.min(), positive.max())
    editors = list(dict.fromkeys(table["editor"]))
    for axes, part in panels:
        median = part.groupby(["editor", "layer"])["norm"].median().unstack("layer")
        layers = range(int(part["layer"].max()) + 1)
        grid = median.reindex(index=editors, columns=layers)
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


def one_against_another(table: pd.DataFrame, x: str, y: str, *, diagonal: bool = False) -> Figure:
    """One number of every editor against another, with both 95% intervals.

    Columns: model, dataset, editor, and for both numbers their name, ``_low``, ``_high`` (percent).
    """
    figure, panels = _panels(table, "model", "dataset", sharey=True)
    editors = list(dict.fromkeys(table["editor"]))
    for axes, part in panels:
        if diagonal:
            axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=1)
        for row in part.to_dict("records"):
            place = editors.index(row["editor"])
            bars = {
                f"{name}err": [[row[n] - row[f"{n}_low"]], [row[f"{n}_high"] - row[n]]]
                for name, n in (("x", x), ("y", y))
            }
            style = {"color": COLOURS[place % len(COLOURS)], "fmt": MARKERS[place % len(MARKERS)]}
            hollow = {"mfc": "none", "elinewidth": 0.7}  # equal points are all seen
            axes.errorbar(row[x], row[y], **bars, **style, **hollow, label=row["editor"])
        axes.set(xlabel=f"{x} (%)", ylabel=f"{y} (%)", xlim=(-4, 104), ylim=(-4, 104))
    handles = {h.get_label(): h for axes, _ in panels for h in axes.containers}
    figure.legend(
        [handles[editor] for editor in editors], editors, loc="outside lower center", ncols=4
    )
    return figure


def paired_matrix(table: pd.DataFrame) -> Figure:
    """Every editor (row) minus every later one (column) on the same requests.

    Columns: model, dataset, a, b, difference, low, high (percentage points); one row per pair,
    a before b. Cells whose 95% interval holds zero have no colour.
    """
    editors = list(dict.fromkeys([*table["a"], *table["b"]]))
    rows, columns = editors[:-1], editors[1:]
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
            annot_kws={"fontsize": 6},
            linewidths=0.5,
            cbar_kws={"label": "Row - column (points)"},
            ax=axes,
        )
        axes.set(xlabel="", ylabel="", title=f"{model}, {dataset}")
        axes.tick_params(axis="y", rotation=0)
        axes.grid(visible=False)
    return figure


def _panels(
    table: pd.DataFrame,
    rows: str,
    columns: str,
    *,
    sharex: bool = True,
    sharey: bool | Literal["row"] = False,
    wide: float = 1.0,
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """One panel per value of ``rows`` and ``columns``, titled; empty cells stay blank.

    Raises:
        KMEBenchError: the table has no rows.
    """
    if table.empty:
        raise KMEBenchError("There is nothing to draw: no run has the numbers of this figure.")
    down, across = (list(dict.fromkeys(table[name])) for name in (rows, columns))
    size = (wide * WIDTH * len(across), HEIGHT * len(down))
    figure, grid = plt.subplots(
        len(down), len(across), figsize=size, sharex=sharex, sharey=sharey, squeeze=False
    )
    panels = []
    for row, above in enumerate(down):
        for column, beside in enumerate(across):
            axes = grid[row, column]
            part = table[(table[rows] == above) & (table[columns] == beside)]
            if part.empty:
                axes.set_axis_off()
                continue
            axes.set_title(f"{above}, {beside}" if len(down) > 1 else str(beside))
            panels.append((axes, part))
    return figure, panels


def _line(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    points: pd.DataFrame,
    index: int,
    label: str,
    linestyle: str | None = None,
) -> None:
    """A line with intervals whose colour, marker and dashes tell the ``index``-th series."""
    bars = (points["mean"] - points["low"], points["high"] - points["mean"])
    axes.errorbar(
        x,
        points["mean"],
        bars,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=linestyle or DASHES[index // len(COLOURS) % len(DASHES)],
        elinewidth=0.7,
        label=label,
    )


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, with as many columns as the figure is wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(columns, int(figure.get_figwidth() / 1.2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
