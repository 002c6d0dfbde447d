"""Mean and variance of rows that come in parts, in float64 (Welford 1962; Chan et al. 1983)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from kmebench.editors.rows import Rows
from kmebench.precision import exact

#: Machine epsilon of float32, added to standard deviations as in the released code.
EPSILON = 2.0**-23


@dataclass(frozen=True)
class Moments:
    """Of all rows so far; never changed in place."""

    count: Tensor  # [] int64, n
    mean: Tensor  # [X]
    squares: Tensor  # [X], sum of squared deviations from the mean

    @classmethod
    def zero(cls, rows: Tensor) -> Self:
        """Return those of no row, for such as ``rows`` [N, X]."""
        none = exact(rows).new_zeros(rows.shape[1])
        return cls(torch.zeros((), dtype=torch.int64), none, none)

    @classmethod
    def none(cls, rows: Rows) -> Self:
        """Return those of no row, for such rows of a module."""
        return cls.zero(rows.joined)

    def with_rows(self, rows: Tensor) -> Self:
        """Return those of the rows so far and of ``rows`` [N, X]."""
        if not len(rows):
            return self
        rows = exact(rows)
        n, more = int(self.count), len(rows)
        mean = rows.mean(dim=0)
        apart = mean - self.mean
        within = (rows - mean).square().sum(dim=0)
        squares = self.squares + within + n * more / (n + more) * apart.square()
        mean = self.mean + more / (n + more) * apart
        return replace(self, count=self.count + more, mean=mean, squares=squares)

    def to(self, device: torch.device) -> Self:
        """Return the same on a device."""
        return replace(self, mean=self.mean.to(device), squares=self.squares.to(device))

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, [X]; zero of fewer than two rows."""
        return (self.squares / max(int(self.count) - 1, 1)).sqrt()

    def normalised(self, rows: Tensor) -> Tensor:
        """Return rows [N, X] without their mean, in units of their standard deviation."""
        return (exact(rows) - self.mean) / (self.deviation + EPSILON)


#: By the shape (in, out) of weights, whose rows [h; g] have in + out numbers.
ByShape = Mapping[tuple[int, int], Moments]


def with_rows(
    moments: ByShape, seen: Sequence[Rows], kind: type[Moments] = Moments
) -> dict[tuple[int, int], Moments]:
    """Return moments of a ``kind``: of earlier rows and of what all modules have seen, by shape."""
    found = dict(moments)
    for rows in seen:
        joined = rows.joined
        known = found.get(rows.shape) or kind.none(rows)
        found[rows.shape] = known.to(joined.device).with_rows(joined)
    return found


def packed(moments: ByShape) -> dict[str, Tensor]:
    """Return the tensors of moments, as ``in.out.what``."""
    return {
        f"{fan_in}.{fan_out}.{part.name}": getattr(each, part.name)
        for (fan_in, fan_out), each in moments.items()
        for part in fields(each)
    }


def unpacked(
    tensors: Mapping[str, Tensor], kind: type[Moments] = Moments
) -> dict[tuple[int, int], Moments]:
    """Read :func:`packed` back, as moments of a ``kind``."""
    parts: dict[tuple[int, int], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        fan_in, fan_out, name = key.split(".")
        parts.setdefault((int(fan_in), int(fan_out)), {})[name] = tensor
    return {shape: kind(**found) for shape, found in parts.items()}
