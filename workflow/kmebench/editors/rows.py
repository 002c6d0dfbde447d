"""Matrices that an editor changes, and what makes up their gradients: inputs and output gradients.

The gradient of a linear module's weight is Σ_t g_t h_tᵀ = Gᵀ H, with h_t its input and g_t the loss
gradient at its output.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.editors.base import check_layers
from kmebench.editors.changes import low_rank
from kmebench.editors.gradients import observed_modules
from kmebench.editors.matrices import Matrices
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import Projection
from kmebench.precision import exact


class Site(NamedTuple):
    """A projection that is edited; of W2 its segments are inputs, of W1 and the gate outputs."""

    projection: Projection
    is_value: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of the module, without what stands before the segments of a fused weight."""
        width, other = self.projection.width, self.projection.weight.shape[1 - self.projection.axis]
        return (width, other) if self.is_value else (other, width)

    def change(self, u: Tensor, v: Tensor) -> WeightDelta:
        """Return ΔW = u v, with u [out, r] and v [r, in], as a change of the stored weight."""
        return low_rank(self.projection, (u, v) if self.is_value else (v.T, u.T))


class Rows(NamedTuple):
    """What a module reads and the gradient of what it says, at N positions."""

    inputs: Tensor  # [N, in], h
    gradients: Tensor  # [N, out], g

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of the module."""
        return self.inputs.shape[1], self.gradients.shape[1]

    @property
    def joined(self) -> Tensor:
        """[h; g], [N, in + out] float64."""
        return exact(torch.cat(self, dim=1))

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two parts, [N, in] and [N, out], of rows like :attr:`joined`."""
        inputs, gradients = joined.split(self.shape, dim=1)
        return inputs, gradients

    def ridge_solution(self, ridge: float | Tensor) -> Tensor:
        """Return (H Hᵀ + ρ I)⁻¹ H, [N, in] float64."""
        inputs = exact(self.inputs)
        gram = inputs @ inputs.T + ridge * torch.eye(len(inputs)).to(inputs)
        return torch.cholesky_solve(inputs, torch.linalg.cholesky(gram))

    @classmethod
    def joint(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the rows of several parts as one."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def sites_of(editor: str, hparams: Matrices, model: EditableModel) -> list[Site]:
    """Return the matrices that an editor changes: W2s, then W1s, then gates.

    Raises:
        ConfigError: the model has no such layer, or no gate with a weight of its own.
    """
    check_layers(editor, hparams.layers, model)
    gates = [gate for layer in hparams.gate_layers if (gate := model.ffn[layer].gate)]
    if len(gates) < len(hparams.gate_layers):
        raise ConfigError(
            f"{editor}: the FFN of this model has no gate with a weight of its own; set "
            "gate_layers: [], and key_layers or value_layers instead."
        )
    values = [Site(model.ffn[layer].value, True) for layer in hparams.value_layers]
    keys = [model.ffn[layer].key for layer in hparams.key_layers]
    return values + [Site(projection, False) for projection in keys + gates]


def rows_of(
    model: EditableModel,
    sites: Sequence[Site],
    lowest: int,
    places: tuple[Tensor, Tensor],
    loss: Callable[[], Tensor],
) -> list[Rows]:
    """Return the rows of every site, of one pass forward and back.

    ``loss`` runs the pass forward and returns a number with its graph. ``places`` are the texts and
    positions, [N] each, that rows are taken at; no site may lie below the layer ``lowest``.
    """
    found: dict[int, Rows] = {}

    def receive(index: int, x: Tensor, gradient: Tensor) -> None:
        texts, positions = (place.to(x.device) for place in places)
        # What stands before the segments in a fused weight stays as it is.
        own = gradient[texts, positions][:, sites[index].projection.offset :]
        found[index] = Rows(x[texts, positions], own)

    modules = [site.projection.module for site in sites]
    with observed_modules(model, modules, receive, lowest):
        loss().backward()
    return [found[index] for index in range(len(sites))]
