"""Closed-form updates against their defining equations, in float64."""

import math

import numpy as np
import pytest
import torch

from kmebench.editors.locate.covariance.factors import inverse_of, spectrum_of
from kmebench.editors.locate.updates import (
    DependentKeysError,
    KeptKeys,
    alphaedit_update,
    emmet_update,
    largest_relative,
    memit_update,
    restraint,
    rome_update,
    spread,
)
from kmebench.errors import EditError

D, M, B = 5, 9, 3


@pytest.fixture
def given():
    torch.manual_seed(0)
    x = torch.randn(40, M, dtype=torch.float64)
    return {
        "weight": torch.randn(D, M, dtype=torch.float64),
        "moment": x.T @ x / 40,
        "keys": torch.randn(M, B, dtype=torch.float64),
        "residual": torch.randn(D, B, dtype=torch.float64),
    }


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_moment", [True, False])
def test_rome_maps_the_probe_to_the_value_by_rank_one(given, with_moment):
    key, probe, value = given["keys"][:, 0], given["keys"][:, 1], given["residual"][:, 0]
    bias = given["residual"][:, 1]
    output = given["weight"] @ probe + bias
    inverse = inverse_of(given["moment"]) if with_moment else None
    u, v = rome_update(value, output, key, probe, inverse)
    close((given["weight"] + u @ v) @ probe + bias, value)
    assert torch.linalg.matrix_rank(u @ v) == 1
    direction = torch.linalg.solve(given["moment"], key) if with_moment else key
    close(v[0], direction / direction.norm())


def test_rome_refuses_a_probe_that_the_key_does_not_reach():
    a, b = torch.eye(M, dtype=torch.float64)[:2]
    with pytest.raises(EditError, match="orthogonal"):
        rome_update(torch.ones(D), torch.zeros(D), a, b, None)


def test_memit_minimises_its_least_squares_objective(given):
    weight, keys, residual = given["weight"], given["keys"], given["residual"]
    penalty = 2.5 * given["moment"]
    u, v = memit_update(residual, keys, inverse_of(given["moment"]), 2.5)
    delta = (u @ v).requires_grad_()
    missing = (weight + delta) @ keys - (weight @ keys + residual)
    objective = missing.square().sum() + (delta @ penalty @ delta.T).trace()
    (gradient,) = torch.autograd.grad(objective, delta)
    close(gradient, torch.zeros_like(gradient))
    normal = torch.linalg.solve(penalty + keys @ keys.T, keys @ residual.T).T
    close(u @ v, normal)


def test_emmet_meets_its_equality_constraints_at_the_least_cost(given):
    keys, residual, penalty = given["keys"], given["residual"], 2.5 * given["moment"]
    u, v = emmet_update(residual, keys, inverse_of(given["moment"]), 2.5, 0.0)
    close(u @ v @ keys, residual)
    # Lagrange: Δ C0 = Λ Kᵀ, Δ K = R, one linear system for each row of Δ.
    system = torch.zeros(M + B, M + B, dtype=torch.float64)
    system[:M, :M], system[:M, M:], system[M:, :M] = penalty, keys, keys.T
    right = torch.cat([torch.zeros(M, D, dtype=torch.float64), residual.T])
    close(u @ v, torch.linalg.solve(system, right)[:M].T)


def test_emmets_epsilon_damps_the_gram_matrix(given):
    keys, residual = given["keys"], given["residual"]
    inverse = torch.linalg.inv(given["moment"])
    u, v = emmet_update(residual, keys, inverse_of(given["moment"]), 1.0, 0.1)
    gram = keys.T @ inverse @ keys + 0.1 * torch.eye(B, dtype=torch.float64)
    close(u @ v, residual @ torch.linalg.inv(gram) @ keys.T @ inverse)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-7, 1e-5])
@pytest.mark.parametrize("length", [1.0, 1e-3])
def test_emmet_refuses_keys_that_are_nearly_the_same_whatever_their_length(given, gap, length):
    """Two keys equal up to 1e-7 used to pass, with a change of norm 7e6."""
    keys = given["keys"].clone()
    keys[:, 2] = length * (keys[:, 0] + gap * keys[:, 2])
    inverse = inverse_of(given["moment"])
    with pytest.raises(DependentKeysError, match=r"dependent.*condition number.*epsilon") as caught:
        emmet_update(given["residual"], keys, inverse, 1.0, 0.0)
    assert caught.value.pair == (0, 2)
    assert all(f.isfinite().all() for f in emmet_update(given["residual"], keys, inverse, 1.0, 0.1))


def test_emmet_takes_keys_that_differ_by_a_hundredth(given):
    keys = given["keys"].clone()
    keys[:, 2] = keys[:, 0] + 0.01 * keys[:, 2]
    u, v = emmet_update(given["residual"], keys, inverse_of(given["moment"]), 1.0, 0.0)
    torch.testing.assert_close(u @ v @ keys, given["residual"], rtol=1e-7, atol=1e-7)


def test_emmet_takes_keys_of_very_different_lengths(given):
    keys = given["keys"] * torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)
    u, v = emmet_update(given["residual"], keys, inverse_of(given["moment"]), 1.0, 0.0)
    torch.testing.assert_close(u @ v @ keys, given["residual"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("calls", [(), (4,), (1, 3), (1, 1, 1, 1)])
def test_alphaedit_solves_its_equation_and_spares_the_preserved_directions(given, calls):
    keys, residual, moment = given["keys"], given["residual"], given["moment"]
    values, vectors = torch.linalg.eigh(moment)
    threshold = float((values[4] + values[5]) / 2)
    spectrum = spectrum_of(moment)
    basis = spectrum.vectors[spectrum.values < threshold].T
    projector = vectors[:, :5] @ vectors[:, :5].T
    close(basis @ basis.T, projector)
    earlier, kept = torch.randn(M, sum(calls), dtype=torch.float64), KeptKeys.none(basis)
    for part in (*earlier.split(calls, dim=1), keys):
        kept = kept.appended(part, basis, 10.0)
    u, v = alphaedit_update(residual, basis, kept)
    left = projector @ (keys @ keys.T + earlier @ earlier.T)
    left += 10.0 * torch.eye(M, dtype=torch.float64)
    close(u @ v, torch.linalg.solve(left, projector @ keys @ residual.T).T)
    close(u @ v @ vectors[:, 5:], torch.zeros(D, M - 5, dtype=torch.float64))


def test_prune_restrains_singular_values_and_keeps_the_vectors():
    torch.manual_seed(0)
    delta = 3 * torch.randn(D, 4, dtype=torch.float64) @ torch.randn(4, M, dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    largest = float(sigma[1] * 0.9)  # two of four are above
    expected = [
        s if s <= largest else math.log(s, 1.2) - math.log(largest, 1.2) + largest
        for s in sigma.tolist()
    ]
    u, v = restraint(delta, largest, 1.2)
    assert u.shape == (D, 2)
    wanted = left @ torch.diag(torch.tensor(expected, dtype=torch.float64)) @ right
    close(delta + u @ v, wanted)
    assert restraint(delta, float(sigma[0] * 1.1), 1.2).u.shape == (D, 0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rect_keeps_exactly_the_largest_relative_changes(given, share):
    delta, weight = given["residual"] @ given["keys"].T, given["weight"]
    kept = largest_relative(delta, weight, share)
    relative = np.abs(delta.numpy() / (weight.numpy() + 1e-8)).ravel()
    chosen = np.argsort(-relative, kind="stable")[: round(share * D * M)]
    expected = np.zeros(D * M)
    expected[chosen] = delta.numpy().ravel()[chosen]
    assert kept.numpy().ravel().tolist() == expected.tolist()


def test_residuals_are_spread_over_the_layers_left(given):
    zero = torch.zeros_like(given["residual"])
    close(spread(given["residual"], zero, 4), given["residual"] / 4)
    close(spread(given["residual"], zero, 4, root=True), given["residual"] / 2)
