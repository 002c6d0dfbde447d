"""Figures with one mark per editor: what is gained against what is lost. Imports no torch.

Tables are those of :func:`kmebench.reporting.figure_tables.trade_offs`. Numbers are percent with
the ends of their 95% intervals, ``_low`` and ``_high``. Rows without a place in the figure are left
out; if all are, the figure says so. ``styles`` are by editor.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kmebench.planning.appearance import Style
from kmebench.reporting.labels import joined, place, together
from kmebench.reporting.panels import Panels, panels, seconds_axis

Styles = Mapping[str, Style]
#: Diameter of a mark whose Generality is 0 and 100%, in points; between them by area.
SMALL, LARGE = 3.0, 13.0
_FLOOR = {"color": "0.6", "linewidth": 0.8, "linestyle": "--", "zorder": 1}
#: Behind names, so that lines do not go through letters.
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.2}
_NAMES: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "center", "linespacing": 1.0}


def overview(table: pd.DataFrame, styles: Styles) -> Figure:
    """Who writes (x), who preserves (y) and who generalises (area of the mark).

    One row of panels per data set, pipeline beside pipeline. Dashed: the Efficacy of the
    unedited model.
    """
    table = table.dropna(subset=["Efficacy", "Locality"])
    table = table.assign(diameter=_diameter(table["Generality"].fillna(0)))
    round_ones = {editor: style._replace(marker="o") for editor, style in styles.items()}
    figure, drawn = panels(table, "cell", "pipeline", sharey=True, high=1.1)
    for axes, part in drawn:
        for x in part.loc[part["control"], "Efficacy"]:
            axes.axvline(x, **_FLOOR)
        _points(axes, part, "Efficacy", "Locality", round_ones)
        axes.set(xlabel="Writes: Efficacy (%)", ylabel="Preserves: Locality (%)")
        _percent(axes)
        axes.label_outer()
    shares = (0, 50, 100)
    sample = {"color": "0.5", "marker": "o", "linestyle": "none", "markeredgecolor": "white"}
    figure.legend(
        [Line2D([], [], markersize=_diameter(share), **sample) for share in shares],
        [f"{share}%" for share in shares],
        loc="outside lower center",
        ncols=len(shares),
        title="Generalises: Generality",
    )
    _name(figure, drawn, "Efficacy", "Locality", styles)
    return figure


def cost_quality(table: pd.DataFrame, styles: Styles) -> Figure:
    """Seconds per edit against Score. Dashed: the Score of the unedited model."""
    table = table.dropna(subset="Score").assign(diameter=6.0)
    figure, drawn = panels(table, "cell", "pipeline", sharey=True)
    for axes, part in drawn:
        for row in part[part["control"]].to_dict("records"):
            axes.axhline(row["Score"], **_FLOOR)
            end = {"xy": (1, row["Score"]), "xycoords": axes.get_yaxis_transform()}
            style = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "0.4"}
            axes.annotate(row["editor"], xytext=(-2, 1), textcoords="offset points", **end, **style)
        _points(axes, part[~part["control"]], "seconds", "Score", styles)
        axes.set(xscale="log", xlabel="Seconds per edit", ylabel="Score (%)", ylim=(-4, 104))
        seconds_axis(axes)
        axes.margins(x=0.15)
        axes.label_outer()
    edited = [(axes, part[~part["control"]]) for axes, part in drawn]
    _name(figure, edited, "seconds", "Score", styles)
    return figure


def one_against_another(
    table: pd.DataFrame, x: str, y: str, styles: Styles, *, diagonal: bool = False
) -> Figure:
    """One number of every editor against another, in percent, by model and data set."""
    figure, drawn = panels(table.assign(diameter=6.0), "model", "dataset", sharey=True)
    for axes, part in drawn:
        if diagonal:
            axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=1)
        _points(axes, part, x, y, styles)
        axes.set(xlabel=f"{x} (%)", ylabel=f"{y} (%)")
        _percent(axes)
    _name(figure, drawn, x, y, styles)
    return figure


def _diameter(generality: Any) -> Any:
    """Diameter of marks in points, by area."""
    return np.sqrt(SMALL**2 + generality / 100 * (LARGE**2 - SMALL**2))


def _percent(axes: Axes) -> None:
    """Show 0 to 100 on both axes, and room for names."""
    axes.set(xlim=(-6, 112), ylim=(-9, 114))
    axes.set(xticks=range(0, 101, 20), yticks=range(0, 101, 20))


def _points(axes: Axes, part: pd.DataFrame, x: str, y: str, styles: Styles) -> None:
    """Draw editors with their intervals; large marks first, so that small ones show on them."""
    for row in part.sort_values("diameter", ascending=False, kind="stable").to_dict("records"):
        colour, marker = styles[row["editor"]]
        bars = {
            f"{axis}err": [[row[n] - row[f"{n}_low"]], [row[f"{n}_high"] - row[n]]]
            for axis, n in (("x", x), ("y", y))
            if f"{n}_low" in row
        }
        axes.errorbar(
            row[x],
            row[y],
            **bars,
            fmt="none",
            ecolor=(colour, 0.35),
            elinewidth=0.8,
            capsize=0,
        )
        style = {"color": colour, "markersize": row["diameter"], "alpha": 0.85, "zorder": 3}
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        axes.plot(row[x], row[y], marker, **style, **edge)


def _name(figure: Figure, drawn: Panels, x: str, y: str, styles: Styles) -> None:
    """Write every editor's name beside its mark; editors on the same place share one."""
    figure.draw_without_rendering()  # the layout decides where marks are
    figure.set_layout_engine("none")
    points = 72 / figure.dpi  # of a pixel
    for axes, part in drawn:
        marks = axes.transData.transform(part[[x, y]].to_numpy()) * points
        groups = together(marks)
        named = part.iloc[[group[0] for group in groups]]
        radii = np.array([part["diameter"].iloc[group].max() / 2 for group in groups])
        texts = [joined(part["editor"].iloc[group].tolist()) for group in groups]
        sizes = np.array([_size(figure, text) for text in texts]) * points
        marks, frame = marks[[group[0] for group in groups]], axes.bbox.extents * points
        offsets = place(marks, radii, sizes, frame) - marks
        far = (abs(offsets) - sizes / 2).max(axis=1) - radii > 4
        for k, row in enumerate(named.to_dict("records")):
            line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0, "shrinkB": radii[k]}
            axes.annotate(
                texts[k],
                (row[x], row[y]),
                tuple(offsets[k]),
                textcoords="offset points",
                color=styles[row["editor"]].colour,
                arrowprops=line if far[k] else None,
                bbox=_PAPER,
                zorder=4,
                **_NAMES,
            )


def _size(figure: Figure, text: str) -> tuple[float, float]:
    """Width and height of a name, in pixels."""
    note = figure.text(0.5, 0.5, text, **_NAMES)
    box = note.get_window_extent()
    note.remove()
    return box.width, box.height
