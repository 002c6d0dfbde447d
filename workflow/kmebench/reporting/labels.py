"""Where the names of marks go, so that nothing lies on anything. Numbers in, numbers out."""

from collections.abc import Sequence

import numpy as np

#: Distances of a name from its mark, in points (1/72 inch).
_DISTANCES = np.array([2.0, 6.0, 12.0, 20.0, 30.0, 42.0, 56.0])
#: Directions: the sixteen winds.
_WINDS = np.array([(np.cos(a), np.sin(a)) for a in np.arange(16) * np.pi / 8])
#: A square point of overlap costs as much as so many points of distance.
_OVERLAP = 50.0
#: So much costs a mark that is nearer to a name than its own, and each line through a name or mark.
_CONFUSED = 25.0
#: In so many orders are names placed, each in so many rounds; the best result counts.
_ORDERS, _ROUNDS = 30, 3
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


def joined(names: Sequence[str]) -> str:
    """Return one name for several marks, two of theirs a line."""
    return ",\n".join(", ".join(names[k : k + 2]) for k in range(0, len(names), 2))


def place(
    marks: np.ndarray, radii: np.ndarray, sizes: np.ndarray, frame: Sequence[float]
) -> np.ndarray:
    """Return the centre of every mark's name, [M, 2], all in points.

    ``radii`` [M] are the marks', ``sizes`` [M, 2] width and height of the names; all stay in the
    ``frame`` (left, bottom, right, top). Each name takes the best place in turn, given the others.
    """
    discs = np.hstack([marks - radii[:, None], marks + radii[:, None]])
    places = [_Places(k, marks, radii, sizes[k], discs, frame) for k in range(len(marks))]
    generator = np.random.default_rng(0)
    best, least = np.empty_like(marks), np.inf
    for _ in range(_ORDERS):
        chosen: dict[int, int] = {}
        for index in [*generator.permutation(len(marks))] * _ROUNDS:
            chosen.pop(index, None)
            chosen[index] = int(np.argmin(_costs(index, places, chosen)))
        rest = [{k: v for k, v in chosen.items() if k != index} for index in chosen]
        total = sum(
            _costs(index, places, others)[chosen[index]]
            for index, others in zip(chosen, rest, strict=True)
        )
        if total < least:
            best = np.array([places[k].centres[chosen[k]] for k in range(len(marks))])
            least = total
    return best


class _Places:
    """All places of one name: centres [C, 2], boxes [C, 4], lines to them [C, 12, 2], costs [C]."""

    def __init__(
        self,
        index: int,
        marks: np.ndarray,
        radii: np.ndarray,
        size: np.ndarray,
        discs: np.ndarray,
        frame: Sequence[float],
    ) -> None:
        mark, rivals = marks[index], np.delete(discs, index, axis=0)
        reach = 1 / np.abs(_WINDS / (size / 2)).max(axis=1)  # of the name's box in each direction
        ways = radii[index] + _DISTANCES[:, None] + reach
        self.centres = (mark + ways[:, :, None] * _WINDS).reshape(-1, 2)
        self.boxes = np.hstack([self.centres - size / 2, self.centres + size / 2])
        steps = np.linspace(0, 1, 12)[:, None]
        self.lines = mark + steps * (self.centres - mark)[:, None]
        distances = np.repeat(_DISTANCES, len(_WINDS))
        low, high = np.array(frame[:2]), np.array(frame[2:])
        outside = (low - self.boxes[:, :2]).clip(min=0) + (self.boxes[:, 2:] - high).clip(min=0)
        nearer = _gaps(self.boxes, rivals) <= distances[:, None]
        confused = nearer.sum(axis=1) + _through(self.lines, rivals).sum(axis=1)
        lies_on = _shared(self.boxes, discs).sum(axis=1) + outside.sum(axis=1)
        self.costs = distances + _OVERLAP * lies_on + _CONFUSED * confused


def _costs(index: int, places: Sequence[_Places], others: dict[int, int]) -> np.ndarray:
    """Cost of every place of a name, given the places of others, [C]."""
    own = places[index]
    if not others:
        return own.costs
    boxes = np.array([places[k].boxes[choice] for k, choice in others.items()])
    lines = np.array([places[k].lines[choice] for k, choice in others.items()])
    crossed = _through(own.lines, boxes).sum(axis=1) + _through(lines, own.boxes).sum(axis=0)
    return own.costs + _OVERLAP * _shared(own.boxes, boxes).sum(axis=1) + _CONFUSED * crossed


def spread(places: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Move places [N] as little as need be for a ``gap`` between neighbours, from low to high.

    Neighbours that are too near move together and share the way, as in isotonic regression.
    """
    order = np.argsort(places, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean of place minus rank, and how many
    for rank, wanted in enumerate(places[order]):
        mean, count = wanted - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        blocks.append((mean, count))
    room = max(low, high - (len(places) - 1) * gap)
    means = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    found = np.empty(len(places))
    found[order] = means.clip(low, room) + gap * np.arange(len(places))
    return found


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area that boxes [A, 4] and [B, 4] share, [A, B]."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, 2:], b[:, 2:])
    return (high - low).clip(min=0).prod(axis=2)


def _gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far boxes [A, 4] and [B, 4] are apart, [A, B]."""
    sides = np.maximum(b[:, :2] - a[:, None, 2:], a[:, None, :2] - b[:, 2:]).clip(min=0)
    return np.hypot(sides[..., 0], sides[..., 1])


def _through(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether lines [A, P, 2] go through boxes [B, 4], [A, B]."""
    points = lines[:, :, None]
    inside = (points > boxes[:, :2]) & (points < boxes[:, 2:])
    return np.any(np.all(inside, axis=3), axis=1)
