"""The metric of what must not change: what a small change of FFN matrices costs on neutral text.

For a change ΔW of a matrix with inputs x and loss gradients g at its output, the KL divergence of
the edited from the original model is, per token of neutral text, to second order

    KL = ½ tr(ΔWᵀ G ΔW C),   C = E[x xᵀ],  G = E[g gᵀ]

(natural gradient, Amari 1998; Kronecker factors, Martens and Grosse 2015). One factor stands on the
residual side of a matrix, D × D, the other on the side of its segments. A gradient is kept as it
arises, an outer product for each position, so nothing of a weight's size is inverted:

    M⁻¹∇ = Σ_p (R⁻¹ r_p)(S⁻¹ s_p)ᵀ,   ⟨∇_p, ∇_q⟩_M⁻¹ = (r_pᵀ R⁻¹ r_q)(s_pᵀ S⁻¹ s_q)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kmebench.editors.locate.covariance.factors import damped

#: Multiplies rows [P, X] by the inverse of one side of a metric.
Solve = Callable[[Tensor], Tensor]


def solver(inverse: Tensor) -> Solve:
    """Multiply rows by an inverse [X, X], or by the reciprocals of a diagonal [X]."""
    if inverse.dim() == 1:
        return lambda rows: rows.to(inverse) * inverse
    return lambda rows: rows.to(inverse) @ inverse


class Positions(NamedTuple):
    """A gradient of one matrix, by positions: Σ_p residual_p ⊗ inner_p, of the losses of n texts.

    ``owner`` [P] says which text a position belongs to.
    """

    residual: Tensor  # [P, D]
    inner: Tensor  # [P, M]
    owner: Tensor  # [P]

    @classmethod
    def joined(cls, parts: Sequence["Positions"]) -> "Positions":
        """Put the positions of several passes together."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Direction(NamedTuple):
    """M⁻¹∇ by positions: Σ_p residual_p ⊗ inner_p over the chosen segments."""

    residual: Tensor  # [P, D]
    inner: Tensor  # [P, S]
    gram: Tensor  # [P, P], ⟨∇_p, ∇_q⟩ in the inverse metric


def natural(positions: Positions, index: Tensor | None, residual: Solve, inner: Solve) -> Direction:
    """Return the natural gradient of one matrix over the segments ``index`` (none given: all)."""
    chosen = positions.inner if index is None else positions.inner[:, index]
    solved_r, solved_s = residual(positions.residual), inner(chosen)
    gram_r = solved_r @ positions.residual.to(solved_r).T
    gram_s = solved_s @ chosen.to(solved_s).T
    return Direction(solved_r, solved_s, gram_r * gram_s)


def natural_scores(positions: Positions, diagonal: Tensor, inverse: Tensor) -> Tensor:
    """Return ‖∇_j‖² of every segment j in the inverse metric, [M]: how far the loss falls per nat.

    Segments are taken by themselves: of their side the ``diagonal`` [M] counts, of the other the
    ``inverse`` [D, D]. Losses of texts count apart.
    """
    residual, scores = solver(inverse), torch.zeros_like(diagonal)
    for text in positions.owner.unique():
        own = positions.owner == text
        r, s = positions.residual[own], positions.inner[own].to(diagonal)
        gram = residual(r) @ r.to(diagonal).T
        scores += ((gram @ s) * s).sum(dim=0) / diagonal
    return scores


def best_of_each(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Return the n segments of each matrix that are worth most; of equals the lower."""
    return [score.sort(descending=True, stable=True).indices[:n].sort().values for score in scores]


def fewest(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the fewest segments of all matrices that hold ``share`` of the sum, by matrix."""
    ranked = torch.cat([score.cpu() for score in scores]).sort(descending=True, stable=True)
    reached = ranked.values.cumsum(dim=0) < share * ranked.values.sum()
    kept = torch.zeros(len(ranked.values), dtype=torch.bool)
    kept[ranked.indices[: int(reached.sum()) + 1]] = True
    return [part.nonzero().flatten() for part in kept.split([len(score) for score in scores])]


def text_gram(directions: Sequence[Direction], owner: Tensor, n_texts: int) -> Tensor:
    """Return ⟨∇_i, ∇_j⟩ of the losses of n texts over all matrices, [n, n]."""
    total = torch.stack([direction.gram.cpu() for direction in directions]).sum(dim=0)
    member = torch.nn.functional.one_hot(owner, n_texts).to(total)
    return member.T @ total @ member


def polyak(gram: Tensor, losses: Tensor, nats: float) -> Tensor:
    """Weight the gradients of n texts for a step down the mean loss, [n].

    The step costs at most ``nats`` per neutral token, and is no longer than to where the
    linearised loss vanishes (Polyak 1987).
    """
    n = len(losses)
    square = gram.sum() / n**2
    length = torch.minimum((2 * nats / square).sqrt(), losses.mean() / square)
    return (length / n).expand(n)


def together(gram: Tensor, losses: Tensor, nats: float, damping: float) -> Tensor:
    """Weight the gradients of n texts so that each linearised loss vanishes at the least cost, [n].

    The cheapest ΔW with ⟨∇_i, ΔW⟩ = −loss_i for all i (Gauss and Newton's step in the metric). At
    most ``nats`` per neutral token: longer steps are cut. ``damping`` keeps the gradients of texts
    apart that are nearly the same.
    """
    weights = torch.linalg.solve(damped(gram, damping), losses.to(gram))
    cost = (weights @ gram @ weights).clamp(min=torch.finfo(gram.dtype).tiny) / 2
    return weights * (nats / cost).sqrt().clamp(max=1.0)
