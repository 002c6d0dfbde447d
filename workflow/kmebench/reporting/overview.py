"""Who writes, who generalises, who preserves: places of marks and labels on the page's picture.

Efficacy lies across, Locality upwards, Generality is a mark's size. Lengths are units of the
drawing, which the page scales. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd

WIDTH, HEIGHT = 400, 330
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 8, 286  # of the frame
_MARGIN = 14  # from the frame to 0 and 100 percent, so that no mark is cut
_SMALL, _CAPITAL, _LINE = 7.0, 9.0, 13.0  # widths of a label's letters, and its height
_REACH = (3, 9, 18, 30, 44)  # from a mark's edge to its label

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Mark:
    """One editor: centre, radius, ends of both intervals, and its label with its anchor."""

    editor: str
    colour: str
    control: bool
    says: str
    x: float
    y: float
    radius: float
    across: tuple[float, float]
    upwards: tuple[float, float]
    label: tuple[float, float]
    anchor: str
    led: bool  # a line leads to the label


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
    centres = [(place_x(r["efficacy"]), place_y(r["locality"])) for r in rows]
    radii = [radius(row["generality"]) for row in rows]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    marks = []
    for row, centre, size in sorted(zip(rows, centres, radii, strict=True), key=lambda m: m[1][1]):
        box, label, anchor, reach = _label(row["editor"], centre, size, taken)
        taken.append(box)
        ends = {n: (row[f"{n}_low"], row[f"{n}_high"]) for n in ("efficacy", "locality")}
        marks.append(
            Mark(
                editor=row["editor"],
                colour=colours[row["editor"]],
                control=row["control"],
                says=_says(row),
                x=centre[0],
                y=centre[1],
                radius=size,
                across=(place_x(ends["efficacy"][0]), place_x(ends["efficacy"][1])),
                upwards=(place_y(ends["locality"][0]), place_y(ends["locality"][1])),
                label=label,
                anchor=anchor,
                led=reach > _REACH[1],
            )
        )
    return tuple(sorted(marks, key=lambda mark: -mark.radius))  # small ones on top


def _says(row: Mapping) -> str:
    parts = [
        f"{name.capitalize()} {row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"
        for name in ("efficacy", "locality", "generality", "score")
    ]
    return "\n".join([row["editor"], *parts, f"{row['n']} edits"])


def _label(
    text: str, centre: tuple[float, float], size: float, taken: Sequence[Box]
) -> tuple[Box, tuple[float, float], str, int]:
    """Find the nearest place for a label that hides nothing, else the one that hides least."""
    width = sum(_CAPITAL if letter.isupper() else _SMALL for letter in text)
    turns = [k * math.pi / 8 for k in (0, 8, 4, 12, 2, 6, 14, 10, 1, 15, 7, 9, 3, 5, 13, 11)]
    found = []
    for reach, turn in product(_REACH, turns):
        x = centre[0] + (size + reach) * math.cos(turn)
        y = centre[1] - (size + reach) * math.sin(turn)
        sideways = math.cos(turn)
        anchor = "start" if sideways > 0.3 else "end" if sideways < -0.3 else "middle"
        left = x - width * {"start": 0, "end": 1, "middle": 0.5}[anchor]
        box = (left, y - _LINE / 2, left + width, y + _LINE / 2)
        hidden = sum(_overlap(box, other) for other in taken) + 9 * _outside(box)
        found.append((hidden, len(found), (box, (round(x, 1), round(y, 1)), anchor, reach)))
        if not hidden:
            break
    return min(found)[2]


def _overlap(a: Box, b: Box) -> float:
    across, upwards = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(across, 0) * max(upwards, 0)


def _outside(box: Box) -> float:
    over = (LEFT + 2 - box[0], box[2] - RIGHT + 1, TOP - box[1], box[3] - BOTTOM + 2)
    return sum(max(length, 0) for length in over)
