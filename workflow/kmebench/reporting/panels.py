"""The common look of figures: style, panels, legends, files. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from kmebench.errors import KMEBenchError
from kmebench.io.files import atomic_path

plt.style.use(Path(__file__).with_name("kmebench.mplstyle"))
COLOURS: list[str] = plt.rcParams["axes.prop_cycle"].by_key()["color"]
WIDTH, HEIGHT = 3.4, 2.5  # of one panel, inches: a paper's column
#: Letters of a panel's title to an inch.
LETTERS = 15
#: Axes of a figure, each with the rows of the table that it shows.
Panels = Sequence[tuple[Axes, pd.DataFrame]]
#: What figures leave out of their files, so that the same figure is the same bytes.
_NO_DATE = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def save(figure: Figure, *paths: str | Path) -> None:
    """Write a figure under several names; the ending decides the format. No dates inside."""
    for path in map(Path, paths):
        kind = path.suffix.removeprefix(".") or "png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=_NO_DATE.get(kind, {}))
            if kind == "png":
                _with_fewer_colours(temporary)
    plt.close(figure)


def _with_fewer_colours(png: Path) -> None:
    """Keep 256 colours: enough for a figure, in a third of the bytes."""
    with Image.open(png) as picture:
        few = picture.convert("RGB").quantize(256)
    few.save(png, "PNG", optimize=True)


def panels(
    table: pd.DataFrame,
    rows: str,
    columns: str,
    *,
    sharex: bool = True,
    sharey: bool | Literal["row"] = False,
    wide: float = 1.0,
    high: float = 1.0,
) -> tuple[Figure, Panels]:
    """One panel per value of ``rows`` and ``columns``; empty cells stay blank.

    Titles say the values and, where the table has ``n``, the number of edits.

    Raises:
        KMEBenchError: the table has no rows.
    """
    if table.empty:
        raise KMEBenchError(
            "There is nothing to draw: no run has the numbers of this figure; set it to null under "
            "figures in your config."
        )
    down, across = (list(dict.fromkeys(table[name])) for name in (rows, columns))
    size = (wide * WIDTH * len(across), high * HEIGHT * len(down))
    figure, grid = plt.subplots(
        len(down), len(across), figsize=size, sharex=sharex, sharey=sharey, squeeze=False
    )
    found = []
    for row, above in enumerate(down):
        for column, beside in enumerate(across):
            axes = grid[row, column]
            part = table[(table[rows] == above) & (table[columns] == beside)]
            if part.empty:
                axes.set_axis_off()
                continue
            title = f"{above} · {beside}" if len(down) > 1 else str(beside)
            parts = [title, edits(part)] if "n" in part else [title]
            axes.set_title(_title(parts, size[0] / len(across)))
            found.append((axes, part))
    return figure, found


def in_lines(table: pd.DataFrame, name: str, beside: str, across: int = 3) -> tuple[Figure, Panels]:
    """One panel per value of ``name``, at most ``across`` of them on a line; no axes are shared.

    Titles say the values and that of ``beside``, of which there is one.
    """
    values = list(dict.fromkeys(table[name]))
    across = min(across, len(values))
    down = -(-len(values) // across)
    size = (WIDTH * across, HEIGHT * down)
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False)
    for axes in grid.flat[len(values) :]:
        axes.set_axis_off()
    found = [(axes, table[table[name] == v]) for axes, v in zip(grid.flat, values, strict=False)]
    for axes, part in found:
        parts = [f"{part[name].iloc[0]} · {part[beside].iloc[0]}"]
        axes.set_title(_title(parts + ([edits(part)] if "n" in part else []), WIDTH))
    return figure, found


def _title(parts: Sequence[str], inches: float) -> str:
    """Write the parts of a panel's title on one line, or on several where it is too narrow."""
    line = " · ".join(parts)
    return line if len(line) <= LETTERS * inches else "\n".join(parts)


def edits(table: pd.DataFrame) -> str:
    """Say how many edits stand behind each number of a table."""
    low, high = int(table["n"].min()), int(table["n"].max())
    return f"{low} edits" if low == high else f"{low} to {high} edits"


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, with as many columns as the figure is wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(columns, int(figure.get_figwidth() / 1.2))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def seconds_axis(axes: Axes) -> None:
    """Label a logarithmic x axis at 1, 2, 5, 10, ..."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
