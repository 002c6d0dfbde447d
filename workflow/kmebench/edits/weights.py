"""Weight deltas: what an edit is.

A :class:`WeightDelta` maps parameter names to parts: :class:`Rows` or :class:`Columns` (some
segments of a matrix, or entries of a vector), :class:`LowRank` or :class:`Dense`. Values are
float32 or better whatever the model's dtype. Files are safetensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from kmebench.precision import exact


def put_segments(tensor: Tensor, axis: int, index: Tensor, values: Tensor) -> None:
    """Overwrite segments of a tensor along ``axis``; ``values[i]`` goes to ``index[i]``.

    Not by indexing a transposed view: under deterministic algorithms CUDA would copy the whole
    tensor, there and back.
    """
    tensor.index_copy_(axis, index, values.movedim(0, axis))


@dataclass(frozen=True)
class _Segments:
    """Distinct segments of a parameter along ``axis``; ``values[i]`` belongs to ``index[i]``."""

    index: Tensor  # [n] int64, ascending, distinct
    values: Tensor  # [n, segment size], or [n] for a vector
    axis: ClassVar[int]

    @classmethod
    def summed(cls, index: Tensor, values: Tensor) -> Self:
        """Build from an index in any order, adding up the values of equal entries."""
        distinct, inverse = index.unique(return_inverse=True)
        total = values.new_zeros(len(distinct), *values.shape[1:])
        return cls(distinct, total.index_add(0, inverse, values))

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the part as a tensor of the parameter's shape."""
        full = self.values.new_zeros(shape)
        put_segments(full, self.axis, self.index, self.values)
        return full

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that make up the part, in the order of its fields."""
        return self.index, self.values

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.values))

    def fits(self, shape: torch.Size) -> bool:
        """Whether the part can be added to a parameter of this shape."""
        if len(shape) <= self.axis or self.index.dim() != 1 or self.index.dtype != torch.int64:
            return False
        inside = (self.index >= 0) & (self.index < shape[self.axis])
        rest = shape[: self.axis] + shape[self.axis + 1 :]
        return bool(inside.all()) and self.values.shape == (len(self.index), *rest)


@dataclass(frozen=True)
class Rows(_Segments):
    """Rows of a matrix, or entries of a vector."""

    axis: ClassVar[int] = 0


@dataclass(frozen=True)
class Columns(_Segments):
    """Columns of a matrix; ``values[i]`` is a column."""

    axis: ClassVar[int] = 1


@dataclass(frozen=True)
class LowRank:
    """``u @ v`` with u [out, r] and v [r, in]."""

    u: Tensor
    v: Tensor

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the part as a tensor of the parameter's shape."""
        return (self.u @ self.v).reshape(shape)

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that make up the part, in the order of its fields."""
        return self.u, self.v

    def norm(self) -> float:
        """Return the Frobenius norm."""
        # |uv|_F^2 = tr(u'u vv'), without forming the product.
        square = torch.sum((self.u.T @ self.u) * (self.v @ self.v.T))
        return float(square.clamp(min=0).sqrt())

    def fits(self, shape: torch.Size) -> bool:
        """Whether the part can be added to a parameter of this shape."""
        return self.u.shape[1:] == self.v.shape[:1] and (
            (*self.u.shape[:1], *self.v.shape[1:]) == tuple(shape)
        )


@dataclass(frozen=True)
class Dense:
    """Every entry of a parameter."""

    values: Tensor

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the part as a tensor of the parameter's shape."""
        return self.values.reshape(shape)

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that make up the part, in the order of its fields."""
        return (self.values,)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.values))

    def fits(self, shape: torch.Size) -> bool:
        """Whether the part can be added to a parameter of this shape."""
        return self.values.shape == shape


Part = Rows | Columns | LowRank | Dense

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Rows, Columns, LowRank, Dense)}
_FACTORS = {name: tuple(field.name for field in fields(kind)) for name, kind in _KINDS.items()}


class WeightDelta(Mapping[str, Part]):
    """An edit: parameter name -> part."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Part:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __add__(self, other: "WeightDelta") -> "WeightDelta":
        """Sum of two deltas of one model; sparse parts of one kind stay sparse."""
        total = dict(self._parts)
        for name, part in other.items():
            total[name] = _add(total[name], part) if name in total else part
        return WeightDelta(total)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every part, by parameter name."""
        return {name: part.norm() for name, part in self.items()}

    def spectral_norms(self) -> dict[str, float]:
        """Largest singular value of every part, by parameter name; a vector's is its norm."""
        return {name: _spectral_norm(part) for name, part in self.items()}

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return all(bool(f.isfinite().all()) for part in self.values() for f in part.factors())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that make up the delta, as ``name|kind|factor``."""
        return {
            f"{name}|{type(part).__name__}|{factor}": tensor
            for name, part in self.items()
            for factor, tensor in zip(_FACTORS[type(part).__name__], part.factors(), strict=True)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "WeightDelta":
        """Rebuild a delta from :meth:`tensors`.

        Raises:
            KeyError: a tensor is missing, or has another name.
        """
        kinds = {tuple(key.split("|")[:2]) for key in tensors}
        return cls(
            {
                name: _KINDS[kind](*(tensors[f"{name}|{kind}|{f}"] for f in _FACTORS[kind]))
                for name, kind in sorted(kinds)
            }
        )


def _spectral_norm(part: Part) -> float:
    """Return the largest singular value, from the smaller Gram matrix; inf if that overflows.

    Segments that are not there are zero, and do not count.
    """
    values = exact(part.u @ part.v if isinstance(part, LowRank) else part.values)
    if values.dim() < 2:
        return part.norm()
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    if not gram.numel():
        return 0.0
    if not gram.isfinite().all():
        return torch.inf
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def _add(a: Part, b: Part) -> Part:
    match a, b:
        case Dense(x), Dense(y):
            return Dense(x + y)
        case LowRank(u, v), LowRank(more_u, more_v):
            return LowRank(torch.cat([u, more_u], dim=1), torch.cat([v, more_v]))
        case Rows(i, x), Rows(j, y):
            return Rows.summed(torch.cat([i, j]), torch.cat([x, y]))
        case Columns(i, x), Columns(j, y):
            return Columns.summed(torch.cat([i, j]), torch.cat([x, y]))
    shape = _shape(a, b)
    return Dense(a.dense(shape) + b.dense(shape))


def _shape(a: Part, b: Part) -> torch.Size:
    """Shape of the parameter that two parts of different kinds touch."""
    match a, b:
        case (Dense(values), _) | (_, Dense(values)):
            return values.shape
        case (LowRank(u, v), _) | (_, LowRank(u, v)):
            return torch.Size((u.shape[0], v.shape[1]))
        case (Rows(_, rows), Columns(_, columns)) | (Columns(_, columns), Rows(_, rows)):
            return torch.Size((columns.shape[1], rows.shape[1]))
    raise TypeError(f"two parts of one kind: {type(a).__name__}")
