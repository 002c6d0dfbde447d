"""Where the names of marks go, so that nothing lies on anything. Numbers in, numbers out."""

from collections.abc import Iterator, Sequence

import numpy as np

#: Distances of a name from its mark, in points (1/72 inch), and directions: eight quarter winds.
_DISTANCES = (2.0, 6.0, 12.0, 20.0, 30.0, 42.0, 56.0)
_DIRECTIONS = np.array([(np.cos(a), np.sin(a)) for a in np.arange(16) * np.pi / 8])
#: A square point of overlap costs as much as so many points of distance.
_OVERLAP = 50.0
#: Marks that are nearer than this, in points, share a name.
_SAME = 1.5


def together(marks: np.ndarray) -> list[list[int]]:
    """Group marks [M, 2] that lie on one another; returns their indices, in order."""
    groups: list[list[int]] = []
    for index, mark in enumerate(marks):
        on = (g for g in groups if np.abs(marks[g[0]] - mark).max() < _SAME)
        group = next(on, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def place(
    marks: np.ndarray, radii: np.ndarray, sizes: np.ndarray, frame: Sequence[float]
) -> np.ndarray:
    """Return the centre of every mark's name, [M, 2], all in points.

    ``radii`` [M] are the marks', ``sizes`` [M, 2] width and height of the names; all stay in the
    ``frame`` (left, bottom, right, top). Each name takes the best free place in turn; two more
    rounds let the earlier ones make room.
    """
    obstacles = np.hstack([marks - radii[:, None], marks + radii[:, None]])
    centres = np.full(marks.shape, np.nan)
    crowded = np.argsort([np.hypot(*(marks - mark).T).sum() for mark in marks], kind="stable")
    for index in [*crowded] * 3:
        others = np.delete(centres, index, axis=0)
        half = np.delete(sizes, index, axis=0) / 2
        names = np.hstack([others - half, others + half])
        blocked = np.vstack([obstacles, names[~np.isnan(names[:, 0])]])
        choices = list(_places(marks[index], radii[index], sizes[index]))
        costs = [
            distance
            + _OVERLAP * _overlap(_box(centre, sizes[index]), blocked)
            + _OVERLAP * _outside(_box(centre, sizes[index]), frame)
            + _OVERLAP * _crossed(marks[index], centre, names)
            for centre, distance in choices
        ]
        centres[index] = choices[int(np.argmin(costs))][0]
    return centres


def _places(
    mark: np.ndarray, radius: float, size: np.ndarray
) -> Iterator[tuple[np.ndarray, float]]:
    """Places around a mark, with their distance; the name touches no mark of that radius."""
    for distance in _DISTANCES:
        for direction in _DIRECTIONS:
            # As far as the name's box reaches in this direction.
            reach = 1 / max(abs(direction / (size / 2)))
            yield mark + direction * (radius + distance + reach), distance


def _box(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - size / 2, centre + size / 2])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """Area that a box shares with others [K, 4]."""
    wide = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    high = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return float((wide.clip(min=0) * high.clip(min=0)).sum())


def _outside(box: np.ndarray, frame: Sequence[float]) -> float:
    """How far a box sticks out of the frame."""
    left, bottom, right, top = frame
    out = np.array([left - box[0], bottom - box[1], box[2] - right, box[3] - top])
    return float(out.clip(min=0).sum())


def _crossed(mark: np.ndarray, centre: np.ndarray, names: np.ndarray) -> int:
    """Through how many names the line from a mark to its own would go."""
    line = mark + np.linspace(0, 1, 12)[:, None] * (centre - mark)
    inside = (line[:, None] > names[:, :2]) & (line[:, None] < names[:, 2:])
    return int(inside.all(axis=2).any(axis=0).sum())
