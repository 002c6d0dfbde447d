"""StableEdit (Ma et al. 2026, "More edits, more stable").

UltraEdit whose gradients are whitened, Σ^(−1/2) (g − μ_g), instead of scaled number by number: once
more rows have been seen than their covariance Σ [out, out] has columns. Inputs stay as they are in
UltraEdit.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kmebench.editors.gradient.cards import StableEditHparams
from kmebench.editors.gradient.moments import Moments
from kmebench.editors.gradient.ultraedit import UltraEdit
from kmebench.editors.rows import Rows
from kmebench.precision import exact

#: Eigenvalues of Σ below it count as it, as in the released code.
FLOOR = 1e-6


@dataclass(frozen=True)
class WhiteMoments(Moments):
    """Moments of rows [h; g], and the scatter Σ_t (g_t − μ_g) (g_t − μ_g)ᵀ of the g."""

    scatter: Tensor  # [out, out]

    @classmethod
    def none(cls, rows: Rows) -> Self:
        """Return those of no row, for such rows of a module."""
        empty, (_, n_out) = Moments.none(rows), rows.shape
        return cls(**vars(empty), scatter=empty.mean.new_zeros(n_out, n_out))

    def with_rows(self, rows: Tensor) -> Self:
        """Return those of the rows so far and of ``rows`` [N, X]."""
        if not len(rows):
            return self
        n, more, own = int(self.count), len(rows), exact(rows)[:, -len(self.scatter) :]
        apart = own.mean(dim=0) - self.mean[-len(self.scatter) :]
        centred = own - own.mean(dim=0)
        between = n * more / (n + more) * apart.outer(apart)
        scatter = self.scatter + centred.T @ centred + between
        return replace(super().with_rows(rows), scatter=scatter)

    def to(self, device: torch.device) -> Self:
        """Return the same on a device."""
        return replace(super().to(device), scatter=self.scatter.to(device))

    @cached_property
    def whitening(self) -> Tensor | None:
        """Σ^(−1/2) [out, out], Σ = scatter / (n − out − 1); none of out + 1 rows or fewer."""
        free = int(self.count) - len(self.scatter) - 1
        if free <= 0:
            return None
        values, vectors = torch.linalg.eigh(self.scatter / free)
        return (vectors * values.clamp(min=FLOOR).rsqrt()) @ vectors.T

    def normalised(self, rows: Tensor) -> Tensor:
        """Return rows [N, X] as :class:`Moments` do, with their gradients whitened if that is so.

        One factor serves all modules of a shape in a call.
        """
        scaled, n_out = super().normalised(rows), len(self.scatter)
        if self.whitening is None:
            return scaled
        centred = (exact(rows) - self.mean)[:, -n_out:]
        return torch.cat([scaled[:, :-n_out], centred @ self.whitening], dim=1)


class StableEdit(UltraEdit):
    """UltraEdit with whitened gradients."""

    hparams: StableEditHparams
    kind = WhiteMoments
