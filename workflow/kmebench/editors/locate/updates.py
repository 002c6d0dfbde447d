"""Closed-form updates of W2 that the locate-and-edit editors make.

W [D, M] maps keys k [M] to outputs [D]; B requests bring keys K [M, B] and residuals R [D, B], what
is still missing at the output. Every update of low rank is returned as factors u [D, r], v [r, M]
in float64, in which all solves are done, on the CPU for a device without it. C is the covariance of
keys, not centred.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.errors import EditError
from kmebench.precision import exact

#: Equality constraints are refused above this condition number of Kᵀ C0⁻¹ K + ε I, each key taken
#: at length one: two keys then differ by less than a part in ten thousand.
MAX_CONDITION = 1e8


class DependentKeysError(EditError):
    """The keys of two requests of a batch cannot be told apart; ``pair`` are their places in it."""

    def __init__(self, pair: tuple[int, int], condition: float) -> None:
        super().__init__(
            f"their keys are (nearly) linearly dependent (condition number {condition:.1e}), so "
            "their equality constraints contradict each other; set epsilon above 0."
        )
        self.pair = pair


class Factors(NamedTuple):
    """``u @ v``."""

    u: Tensor  # [D, r]
    v: Tensor  # [r, M]


def rome_update(
    value: Tensor, output: Tensor, key: Tensor, probe: Tensor, inverse: Tensor | None
) -> Factors:
    """Return the rank-one Δ with (W + Δ) probe = value, where W probe = ``output`` (with bias).

    Δ = (value − output) uᵀ / (probeᵀ u), u = C⁻¹ key normalised (Meng et al. 2022, eq. 2);
    ``inverse`` is C⁻¹, none for C = I. R-ROME (Gupta et al. 2024) probes with the key itself.

    Raises:
        EditError: probe and u are orthogonal.
    """
    key, probe = exact(key), exact(probe)
    u = key if inverse is None else inverse @ key
    u = u / u.norm()
    scale = probe @ u
    if scale.abs() <= 1e-12 * probe.norm():
        raise EditError("The key is orthogonal to the prompt's own: no rank-one update reaches it.")
    return Factors(((exact(value) - exact(output)) / scale)[:, None], u[None])


def memit_update(residual: Tensor, keys: Tensor, inverse: Tensor, weight: float) -> Factors:
    """Return Δ = R (I + Kᵀ (λC)⁻¹ K)⁻¹ Kᵀ (λC)⁻¹ (Meng et al. 2023, eq. 14, by Woodbury).

    It minimises ‖(W + Δ) K − (W K + R)‖² + tr(Δ λC Δᵀ). ``inverse`` is C⁻¹, ``weight`` λ.
    """
    return _weighted(residual, *_gram(keys, inverse, weight, 1.0))


def with_keys(inverse: Tensor, keys: Tensor) -> Tensor:
    """Return (A + K Kᵀ)⁻¹ of A⁻¹ [M, M] by Woodbury, M² B operations."""
    solved, gram = _gram(keys, inverse, 1.0, 1.0)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), solved.T, upper=False)
    return inverse - half.T @ half


def emmet_update(
    residual: Tensor, keys: Tensor, inverse: Tensor, weight: float, epsilon: float
) -> Factors:
    """Return Δ = R (Kᵀ C0⁻¹ K + ε I)⁻¹ Kᵀ C0⁻¹ with C0 = λC (Gupta et al. 2024).

    With ε = 0 it meets (W + Δ) K = W K + R. ``inverse`` is C⁻¹, ``weight`` λ.

    Raises:
        DependentKeysError: the keys are nearly linearly dependent (with ε at or near 0).
    """
    solved, gram = _gram(keys, inverse, weight, epsilon)
    _check_independent(gram)
    return _weighted(residual, solved, gram)


def _gram(keys: Tensor, inverse: Tensor, weight: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Return (λC)⁻¹ K [M, B] and Kᵀ (λC)⁻¹ K + ridge I [B, B]."""
    keys = exact(keys)
    solved = inverse @ keys / weight
    gram = keys.T @ solved
    gram.diagonal().add_(ridge)
    return solved, gram


def _weighted(residual: Tensor, solved: Tensor, gram: Tensor) -> Factors:
    """Return R ``gram``⁻¹ ``solved``ᵀ."""
    inner = torch.linalg.cholesky(gram)
    return Factors(torch.cholesky_solve(exact(residual).T, inner).T, solved.T)


def _check_independent(gram: Tensor) -> None:
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    smallest = values[0].clamp(min=torch.finfo(gram.dtype).tiny)
    condition = float(values[-1] / smallest)
    if condition > MAX_CONDITION:
        first, second = sorted(vectors[:, 0].abs().topk(2).indices.tolist())
        raise DependentKeysError((first, second), condition)


class KeptKeys(NamedTuple):
    """E keys K whose outputs stay, in the coordinates of a ``basis`` U, [M, n], of what may change.

    They are appended as calls bring them, so that a call costs M n + n E + E² operations for a key.
    """

    along: Tensor  # [n, E], Uᵀ K
    factor: Tensor  # [E, E], L, lower, with L Lᵀ = Kᵀ U Uᵀ K + α I

    @classmethod
    def none(cls, basis: Tensor) -> "KeptKeys":
        """Return no keys."""
        return cls(basis.new_zeros(basis.shape[1], 0), basis.new_zeros(0, 0))

    def appended(self, keys: Tensor, basis: Tensor, ridge: float) -> "KeptKeys":
        """Return these and further keys [M, B]; ``ridge`` is α."""
        before, along = len(self.factor), basis.T @ exact(keys)
        cross = torch.linalg.solve_triangular(self.factor, self.along.T @ along, upper=False)
        own = along.T @ along - cross.T @ cross
        own.diagonal().add_(ridge)
        factor = self.factor.new_zeros(before + len(own), before + len(own))
        factor[:before, :before] = self.factor
        factor[before:, :before] = cross.T
        factor[before:, before:] = torch.linalg.cholesky(own)
        return KeptKeys(torch.cat([self.along, along], dim=1), factor)


def alphaedit_update(residual: Tensor, basis: Tensor, kept: KeptKeys) -> Factors:
    """Return Δ = Xᵀ with [P (K Kᵀ + K_p K_pᵀ) + α I] X = P K Rᵀ (Fang et al. 2025, eq. 14).

    P = U Uᵀ, with U the ``basis`` [M, n], projects on what no preserved key uses. ``kept`` are the
    keys K_p of earlier edits and behind them the B keys K of this one. With K̂ = [K_p, K] this is
    R Eᵀ (α I + K̂ᵀ P K̂)⁻¹ K̂ᵀ P, E the last B columns of I. A basis U (I + diag(h) / α)^(−1/2) adds
    U diag(h) Uᵀ to the inner sum: how much each direction is held besides (BetaEdit).
    """
    count = residual.shape[1]
    last = kept.factor.new_zeros(len(kept.factor), count)
    own = kept.factor[-count:, -count:]
    last[-count:] = torch.linalg.solve_triangular(own, torch.eye(count).to(own), upper=False)
    weights = torch.linalg.solve_triangular(kept.factor.T, last, upper=True)
    return Factors(exact(residual), (basis @ (kept.along @ weights)).T)


def spread(target: Tensor, current: Tensor, layers_left: int, *, root: bool = False) -> Tensor:
    """Return the share of the residual, [D, B], that the first of ``layers_left`` layers takes.

    Equal shares (MEMIT), or that of the square root (PMET, Li et al. 2024).
    """
    return (target - current) / (layers_left**0.5 if root else layers_left)


def restraint(delta: Tensor, largest: float, base: float) -> Factors:
    """Return what takes a run's total Δ [D, M] to its restrained form (PRUNE, Ma et al. 2025).

    Singular values σ above ``largest``, the largest one of W0, become
    log_base(σ) − log_base(largest) + largest; singular vectors stay. Δ' − Δ = U₊ (Σ'Σ⁻¹ − I) U₊ᵀ Δ,
    with U₊ the left singular vectors of those σ: eigenvectors of Δ Δᵀ.
    """
    delta = exact(delta)
    squares, vectors = torch.linalg.eigh(delta @ delta.T)
    above = squares > largest**2
    sigma, left = squares[above].sqrt(), vectors[:, above]
    wanted = torch.log(sigma / largest) / math.log(base) + largest
    return Factors(left * (wanted / sigma - 1.0), left.T @ delta)


def largest_relative(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Zero all but the ``share`` of entries with the largest |Δ / (W + 1e-8)| (RECT, Gu 2024).

    ``delta`` and ``weight`` are [D, M]; of equal entries the first count.
    """
    relative = (delta / (weight + 1e-8)).abs().flatten()
    kept = relative.sort(descending=True, stable=True).indices[: round(share * len(relative))]
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.reshape(delta.shape)
