"""The metric of what must not change, against dense matrices and Lagrange's conditions."""

import pytest
import torch

from kmebench.editors.locate.covariance.factors import damped, inverse_of
from kmebench.editors.pac.metric import (
    Positions,
    natural,
    natural_scores,
    polyak,
    solver,
    text_gram,
    together,
)

D, M, P = 3, 5, 4
OWNER = torch.tensor([0, 0, 1, 2])


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(1)

    def moment(size):
        rows = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
        return rows.T @ rows / len(rows)

    return moment(D), moment(M)


@pytest.fixture
def positions():
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return Positions(draw(P, D), draw(P, M), OWNER)


def gradients(positions, index=None):
    """The gradient of each text's loss, flattened: columns of D stacked."""
    inner = positions.inner if index is None else positions.inner[:, index]
    outer = torch.einsum("pd,pm->pmd", positions.residual, inner).flatten(1)
    return torch.stack([outer[positions.owner == text].sum(dim=0) for text in range(3)])


def solve(moment):
    return solver(torch.linalg.inv(moment))


def test_the_natural_gradient_is_that_of_the_whole_matrix(sides, positions):
    residual, inner = sides
    index = torch.tensor([0, 2, 3])
    block = inner[index][:, index]
    direction = natural(positions, index, solve(residual), solve(block))
    dense = torch.linalg.solve(torch.kron(block, residual), gradients(positions, index).T)
    found = torch.einsum("pd,pm->pmd", direction.residual, direction.inner).flatten(1)
    torch.testing.assert_close(found.sum(dim=0), dense.sum(dim=1))
    gram = text_gram([direction], OWNER, 3)
    torch.testing.assert_close(gram, gradients(positions, index) @ dense)


def test_a_step_for_all_texts_is_the_cheapest_that_meets_each_loss(sides, positions):
    residual, inner = sides
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    direction = natural(positions, None, solve(residual), solve(inner))
    weights = together(text_gram([direction], OWNER, 3), losses, nats=1e9, damping=0.0)
    change = (weights[OWNER][:, None] * direction.residual).T @ direction.inner  # [D, M]
    # Lagrange: minimise ½ δᵀMδ under Jδ = losses.
    metric, jacobian = torch.kron(inner, residual), gradients(positions)
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    system = torch.cat([torch.cat([metric, jacobian.T], 1), torch.cat([jacobian, zeros], 1)])
    right = torch.cat([torch.zeros(D * M, dtype=torch.float64), losses])
    torch.testing.assert_close(change.T.flatten(), torch.linalg.solve(system, right)[: D * M])


@pytest.mark.parametrize("step", ["polyak", "together"])
def test_no_step_costs_more_than_its_nats(sides, positions, step):
    residual, inner = sides
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    direction = natural(positions, None, solve(residual), solve(inner))
    gram = text_gram([direction], OWNER, 3)
    weights = polyak(gram, losses, 1e-4) if step == "polyak" else together(gram, losses, 1e-4, 0.0)
    change = (weights[OWNER][:, None] * direction.residual).T @ direction.inner
    flat = change.T.flatten()
    cost = flat @ torch.kron(inner, residual) @ flat / 2
    torch.testing.assert_close(cost, torch.tensor(1e-4, dtype=torch.float64))


def test_polyaks_step_ends_where_the_linearised_mean_loss_vanishes(sides, positions):
    residual, inner = sides
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    direction = natural(positions, None, solve(residual), solve(inner))
    weights = polyak(text_gram([direction], OWNER, 3), losses, nats=1e9)
    change = (weights[OWNER][:, None] * direction.residual).T @ direction.inner
    falls = gradients(positions).mean(dim=0) @ change.T.flatten()
    torch.testing.assert_close(falls, losses.mean())


def test_no_other_direction_lowers_the_loss_more_at_the_same_cost(sides, positions):
    residual, inner = sides
    direction = natural(positions, None, solve(residual), solve(inner))
    metric, gradient = torch.kron(inner, residual), gradients(positions).sum(dim=0)
    found = torch.einsum("pd,pm->md", direction.residual, direction.inner).flatten()
    best = gradient @ found / (found @ metric @ found).sqrt()
    others = torch.randn(
        200, D * M, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    falls = others @ gradient / torch.einsum("ni,ij,nj->n", others, metric, others).sqrt()
    assert (falls < best).all()


def test_damping_is_relative_to_the_mean_eigenvalue(sides):
    _, inner = sides
    mean = torch.linalg.eigvalsh(inner).mean()
    wanted = inner + 0.1 * mean * torch.eye(M)
    torch.testing.assert_close(damped(inner, 0.1), wanted)
    torch.testing.assert_close(inverse_of(inner, 0.1), torch.linalg.inv(wanted))
    torch.testing.assert_close(damped(inner.diagonal(), 0.1), wanted.diagonal())


def test_without_end_to_the_damping_the_direction_is_the_gradient(sides, positions):
    residual, inner = sides
    far = 1e12
    scaled = natural(
        positions,
        None,
        solver(inverse_of(residual, far) * far * residual.diagonal().mean()),
        solver(inverse_of(inner, far) * far * inner.diagonal().mean()),
    )
    found = torch.einsum("pd,pm->pmd", scaled.residual, scaled.inner)
    wanted = torch.einsum("pd,pm->pmd", positions.residual, positions.inner)
    torch.testing.assert_close(found, wanted)


def test_the_score_of_a_segment_is_its_own_gradient_in_the_metric(sides, positions):
    residual, inner = sides
    scores = natural_scores(positions, inner.diagonal(), torch.linalg.inv(residual))
    for j in range(M):
        own = gradients(positions, torch.tensor([j]))  # [3, D]
        metric = inner[j, j] * residual
        wanted = torch.einsum("na,ab,nb->", own, torch.linalg.inv(metric), own)
        torch.testing.assert_close(scores[j], wanted)
