"""Who writes, who generalises, who preserves: places of marks and names on the page's picture.

Efficacy lies across, Locality upwards, Generality is a mark's size. Lengths are units of the
drawing, which the page scales. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kmebench.reporting.labels import joined, place, together

WIDTH, HEIGHT = 400, 330
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 8, 286  # of the frame
_MARGIN = 14  # from the frame to 0 and 100 percent, so that no mark is cut
_SMALL, _CAPITAL = 7.0, 9.0  # widths of a name's letters
LINE = 14.0  # height of a name's line
_NEAR = 8.0  # a name that is nearer to its mark needs no line


@dataclass(frozen=True)
class Name:
    """The name of one or more marks: its lines, the first one's centre, and a line's end."""

    lines: tuple[str, ...]
    x: float
    y: float
    line: tuple[float, float] | None


@dataclass(frozen=True)
class Mark:
    """One editor: centre, radius, ends of both intervals, name unless another mark has it."""

    editor: str
    colour: str
    control: bool
    says: str
    x: float
    y: float
    radius: float
    across: tuple[float, float]
    upwards: tuple[float, float]
    name: Name | None


@dataclass(frozen=True)
class Panel:
    """One model, data set and pipeline."""

    title: str
    marks: tuple[Mark, ...]


def place_x(percent: float) -> float:
    """Return where a percentage lies across."""
    return round(LEFT + _MARGIN + percent / 100 * (RIGHT - LEFT - 2 * _MARGIN), 1)


def place_y(percent: float) -> float:
    """Return where a percentage lies upwards."""
    return round(BOTTOM - _MARGIN - percent / 100 * (BOTTOM - TOP - 2 * _MARGIN), 1)


def radius(percent: float) -> float:
    """Return the radius of a mark: its area grows with the percentage."""
    return round(3.5 + 7.5 * math.sqrt(max(percent, 0) / 100), 1)


def panels(cells: pd.DataFrame, colours: Mapping[str, str]) -> list[Panel]:
    """Lay every model, data set and pipeline out; ``colours`` by editor.

    ``cells`` is of :func:`kmebench.reporting.page_numbers.main_cells`; rows without one of the
    three metrics are left out.
    """
    if cells.empty:
        return []
    known = cells.dropna(subset=["efficacy", "locality", "generality"])
    models = known["model"].nunique()
    return [
        Panel(" · ".join(names[models == 1 :]), _marks(cell.to_dict("records"), colours))
        for names, cell in known.groupby(["model", "dataset", "mode"], sort=False)
    ]


def _marks(rows: Sequence[Mapping], colours: Mapping[str, str]) -> tuple[Mark, ...]:
    centres = np.array([(place_x(row["efficacy"]), place_y(row["locality"])) for row in rows])
    radii = np.array([radius(row["generality"]) for row in rows])
    names = _names([row["editor"] for row in rows], centres, radii)
    marks = [
        Mark(
            editor=row["editor"],
            colour=colours[row["editor"]],
            control=row["control"],
            says=_says(row),
            x=float(centre[0]),
            y=float(centre[1]),
            radius=float(size),
            across=(place_x(row["efficacy_low"]), place_x(row["efficacy_high"])),
            upwards=(place_y(row["locality_low"]), place_y(row["locality_high"])),
            name=names.get(index),
        )
        for index, (row, centre, size) in enumerate(zip(rows, centres, radii, strict=True))
    ]
    return tuple(sorted(marks, key=lambda mark: -mark.radius))  # small ones on top


def _names(editors: Sequence[str], centres: np.ndarray, radii: np.ndarray) -> dict[int, Name]:
    """Place one name for all marks that lie on one another, by the first one's index."""
    groups = together(centres)
    firsts = [group[0] for group in groups]
    texts = [joined([editors[index] for index in group]).split("\n") for group in groups]
    sizes = np.array([(max(map(_width, lines)), LINE * len(lines)) for lines in texts])
    marks = centres[firsts]
    places = place(marks, radii[firsts], sizes, (LEFT, TOP, RIGHT, BOTTOM))
    ends = np.clip(marks, places - sizes / 2, places + sizes / 2)  # of lines from marks to names
    far = np.hypot(*(ends - marks).T) - radii[firsts] > _NEAR
    found = [
        Name(tuple(lines), x, y - LINE * (len(lines) - 1) / 2, (*end,) if led else None)
        for lines, (x, y), end, led in zip(
            texts, places.round(1).tolist(), ends.round(1).tolist(), far, strict=True
        )
    ]
    return dict(zip(firsts, found, strict=True))


def _width(text: str) -> float:
    return sum(_CAPITAL if letter.isupper() else _SMALL for letter in text)


def _says(row: Mapping) -> str:
    parts = [
        f"{name.capitalize()} {row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"
        for name in ("efficacy", "locality", "generality", "score")
    ]
    return "\n".join([row["editor"], *parts, f"{row['n']} edits"])
