"""The metric of one FFN matrix: read from cached stages, and grown by what an edit is to keep.

| matrix | residual side, D × D | side of the M segments |
|---|---|---|
| W1 | E[x xᵀ] of its input | E[g²] of its output, a diagonal |
| W2 | E[g gᵀ] of its output | E[k kᵀ] of its input, the covariance of ROME's family |

Inputs are kept by adding their outer products to the side that an input meets: x for W1, k for W2.
So AlphaEdit keeps the keys of earlier edits, and online Laplace the Fisher matrix of earlier tasks
(Ritter et al. 2018).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kmebench.editors.base import Assets
from kmebench.editors.locate.covariance.factors import damped, inverse_of, read_inverse
from kmebench.editors.locate.covariance.store import Covariances
from kmebench.editors.locate.updates import with_keys
from kmebench.editors.needs import Covariance, Inverse, NeutralMetric
from kmebench.editors.pac.cards import NPACHparams
from kmebench.editors.pac.gradients import KEY
from kmebench.editors.pac.metric import Solve, solver
from kmebench.editors.pac.neutral import read_metric


@dataclass(frozen=True)
class MatrixMetric:
    """The metric of W1 (``KEY``) or W2 (``VALUE``) of a layer, in float64.

    ``residual`` is the inverse of the residual side, [D, D]. ``segments`` is the moment of the
    other side, [M, M] or its diagonal [M]; or its inverse [M, M], where all segments are moved.
    """

    matrix: int
    residual: Tensor
    segments: Tensor
    inverted: bool = False

    @property
    def diagonal(self) -> Tensor:
        """What each segment costs by itself, [M]; not of an inverse."""
        return self.segments if self.segments.dim() == 1 else self.segments.diagonal()

    def solvers(self, index: Tensor | None) -> tuple[Solve, Solve]:
        """Return what divides by the two sides, that of the segments ``index`` (none: all)."""
        own = self.segments
        if not self.inverted and own.dim() == 1:
            own = 1 / (own if index is None else own[index])
        elif not self.inverted:
            own = inverse_of(own if index is None else own[index][:, index])
        return solver(self.residual), solver(own)

    def to(self, device: torch.device | str) -> "MatrixMetric":
        """Return the metric on another device."""
        sides = {"residual": self.residual.to(device), "segments": self.segments.to(device)}
        return replace(self, **sides)

    def with_inputs(self, rows: Tensor) -> "MatrixMetric":
        """Return the metric that keeps inputs [n, D] of W1, or [n, M] of W2, as well."""
        keys = rows.to(self.residual).T
        if self.matrix == KEY:
            return replace(self, residual=with_keys(self.residual, keys))
        if self.inverted:
            return replace(self, segments=with_keys(self.segments, keys))
        added = keys.square().sum(dim=1) if self.segments.dim() == 1 else keys @ keys.T
        return replace(self, segments=self.segments + added)


def read_matrix_metric(
    assets: Assets, hparams: NPACHparams, layer: int, matrix: int
) -> MatrixMetric:
    """Read the metric of a matrix from the cached stages, on the CPU.

    Raises:
        KMEBenchError: a file is of another kind or of other layers, or damaged.
    """
    moments = read_metric(assets[NeutralMetric.asset], layer)
    residual = moments.inputs if matrix == KEY else moments.outputs
    residual = inverse_of(residual, hparams.residual_damping)
    if matrix == KEY:
        return MatrixMetric(matrix, residual, damped(moments.inner, hparams.segment_damping))
    damping = hparams.segment_damping
    if hparams.whole and (cached := assets.get(Inverse(layer).key)):
        return MatrixMetric(matrix, residual, read_inverse(cached), inverted=True)
    covariance = Covariances.open(assets[Covariance.asset]).of(layer)
    if hparams.whole:
        return MatrixMetric(matrix, residual, inverse_of(covariance, damping), inverted=True)
    if hparams.segment_side == "diagonal":
        covariance = covariance.diagonal()
    return MatrixMetric(matrix, residual, damped(covariance, damping))
