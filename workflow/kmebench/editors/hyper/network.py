"""A network that turns what makes up a gradient into what makes up an edit.

One network for every shape (in, out) of the edited matrices; all matrices of a shape share it, but
for a scale, a shift and a step size of their own. At the start it returns normalised rows.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kmebench.editors.gradient.moments import ByShape, packed, unpacked, with_rows
from kmebench.editors.hyper.cards import HyperHparams, trained_values
from kmebench.editors.rows import Rows
from kmebench.errors import KMEBenchError
from kmebench.io.tensors import TensorFile, write_tensors

#: Blocks of a network, as published.
BLOCKS = 2
FORMAT = "kmebench.hypernetwork.v1"
_WEIGHTS, _MOMENTS = "weights|", "moments|"


class Block(nn.Module):
    """A residual block of two maps of low rank; the second is zero at the start."""

    def __init__(self, size: int, rank: int, modules: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(min(rank, size), size, generator=generator))
        self.up = nn.Parameter(torch.zeros(size, min(rank, size)))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modules, size))
        self.shift = nn.Parameter(torch.zeros(modules, size))

    def mapped(self, z: Tensor) -> Tensor:
        """Return P Q z + b for rows z [N, in + out]."""
        return z @ self.down.T @ self.up.T + self.bias

    @abstractmethod
    def forward(self, z: Tensor, module: int) -> Tensor:
        """Return rows z [N, in + out] of a module of this shape, changed."""


class Hypernetwork(nn.Module):
    """The networks of all shapes, the step sizes, and the moments that rows are normalised by.

    ``shapes`` are the (in, out) of the edited matrices, in the order of
    :func:`~kmebench.editors.rows.sites_of`.
    """

    block: ClassVar[type[Block]]

    def __init__(self, shapes: Sequence[tuple[int, int]], hparams: HyperHparams) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(hparams.seed)
        modules = Counter(shapes)
        self.blocks = nn.ModuleDict(
            {
                _key(shape): nn.ModuleList(
                    self.block(sum(shape), hparams.rank, count, generator) for _ in range(BLOCKS)
                )
                for shape, count in modules.items()
            }
        )
        self.places = [shapes[:site].count(shape) for site, shape in enumerate(shapes)]
        self.step_sizes = nn.Parameter(torch.full((len(shapes),), hparams.step_size))
        self.moments: ByShape = {}

    def learn_moments(self, seen: Sequence[Rows]) -> None:
        """Count rows among those that others are normalised by; only training does."""
        self.moments = with_rows(self.moments, seen)

    def transformed(self, site: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return (h̃, g̃), [N, in] and [N, out], of the rows of a site."""
        joined = rows.joined
        z = self.moments[rows.shape].to(joined.device).normalised(joined).to(self.step_sizes)
        for block in self.blocks[_key(rows.shape)]:
            z = block(z, self.places[site])
        return rows.split(z)

    @abstractmethod
    def factors(self, site: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return u [out, N], v [N, in] of the change ΔW = u v of a site, with their graph."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all that training makes: weights and moments."""
        weights = {_WEIGHTS + name: tensor for name, tensor in self.state_dict().items()}
        return weights | {_MOMENTS + name: each for name, each in packed(self.moments).items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put :meth:`tensors` of a network of the same shapes in.

        Raises:
            RuntimeError: they are of other shapes.
        """
        self.load_state_dict(_those(_WEIGHTS, tensors))
        self.moments = unpacked(_those(_MOMENTS, tensors))

    def save(self, path: str | Path, hparams: HyperHparams, records: int) -> None:
        """Write the network, the values that it was trained with, and by how many records."""
        facts = {"settings": trained_values(hparams), "records": records}
        write_tensors(path, self.tensors(), FORMAT, facts)

    @classmethod
    def load(
        cls, path: str | Path, shapes: Sequence[tuple[int, int]], hparams: HyperHparams
    ) -> Self:
        """Read a network of :meth:`save`.

        Raises:
            KMEBenchError: the file holds none, is damaged, or is of another model or other values.
        """
        file = TensorFile.open(path, FORMAT)
        tensors = {name: file.tensor(name) for name in file.digests}
        network = cls(shapes, hparams).to(tensors[f"{_WEIGHTS}step_sizes"].dtype)
        try:
            if file.facts["settings"] != trained_values(hparams):
                raise ValueError("its values are others")
            network.load_tensors(tensors)
        except (ValueError, RuntimeError) as error:
            raise KMEBenchError(
                f"{path} holds a hyper-network of another model or trained with other values; "
                "take the one that the workflow trains for these."
            ) from error
        return network.requires_grad_(False)


def _key(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _those(begin: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what begins so, without it."""
    return {k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)}
