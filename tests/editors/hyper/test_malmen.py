"""MALMEN's normal equations against torch.linalg, in float64."""

import math

import pytest
import torch

from kmebench.editors.gradient.moments import EPSILON
from kmebench.editors.gradient.ultraedit import ridge_change
from kmebench.editors.rows import Rows
from tests.conftest import FAMILIES
from tests.editors.hyper.networks import editor_of, fresh, ready
from tests.editors.hyper.test_mend import close, dense


@pytest.fixture
def network(make_model):
    return fresh(editor_of("malmen"), make_model("llama"), moved=0.3)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return Rows(torch.randn(6, 24).double(), torch.randn(6, 16).double())


def wanted(network, rows):
    """V of the paper, token by token."""
    found = []
    for index in range(len(rows.inputs)):
        h, g = (part[index : index + 1] for part in rows)
        h_new, g_new = network.transformed(1, Rows(h, g))
        found.append(-network.step_sizes[1] * (h_new @ h.T) * g_new)
    return torch.cat(found)


def test_the_change_solves_the_normal_equations(network, rows):
    h, ridge = rows.inputs, network.log_ridges[1].exp()
    gram = h.T @ h + ridge * torch.eye(24).double()
    expected = torch.linalg.solve(gram, h.T @ wanted(network, rows)).T
    u, v = network.factors(1, rows)
    assert u.shape[1] == 6
    close(u @ v, expected)
    slope = h.T @ (h @ (u @ v).T - wanted(network, rows)) + ridge * (u @ v).T
    assert slope.abs().max() < 1e-12 * wanted(network, rows).abs().max()


def test_one_token_without_a_ridge_gets_what_it_wants(network, rows):
    one = Rows(rows.inputs[:1], rows.gradients[:1])
    network.log_ridges.data[1] = -60
    u, v = network.factors(1, one)
    close((u @ v) @ one.inputs[0], wanted(network, one)[0])


def test_its_blocks_scale_and_shift_behind_the_clamp(network, rows):
    z = torch.cat(rows, dim=1) / (1 + EPSILON)
    for block in network.blocks["24x16"]:
        inner = (block.up @ (block.down @ z.T) + block.bias[:, None]).T
        z = z + block.scale[1] * torch.where(inner > 0, inner, 0.0) + block.shift[1]
    close(torch.cat(network.transformed(1, rows), dim=1), z)


def test_an_untrained_network_is_ultraedit_but_for_the_size_of_steps(make_model, rows):
    network = fresh(editor_of("malmen"), make_model("llama"))
    u, v = network.factors(1, rows)
    other_u, other_v = ridge_change(rows, network.moments[24, 16], 0.05, 1.0)
    close(v, other_v)
    normal = rows.inputs / (1 + EPSILON)
    along, square = (normal * rows.inputs).sum(1), normal.square().sum(1)
    torch.testing.assert_close(u / along, other_u / square, rtol=1e-6, atol=0.0)  # α is float32


def test_the_gradients_through_the_solve_are_the_papers(network, rows):
    """∂L/∂V = H Y and ∂L/∂λ = −e^λ ⟨Y, ΔWᵀ⟩ with Y = (HᵀH + e^λ I)⁻¹ A."""
    network.requires_grad_()
    torch.manual_seed(1)
    held = torch.randn(24, 16).double()  # A, [in, out]
    u, v = network.factors(1, rows)
    u.retain_grad()
    ((u @ v).T * held).sum().backward()
    h, ridge = rows.inputs, network.log_ridges[1].exp().detach()
    y = torch.linalg.solve(h.T @ h + ridge * torch.eye(24).double(), held)
    close(u.grad.T, h @ y)
    change = (u @ v).detach().T
    assert math.isclose(network.log_ridges.grad[1], -ridge * (y * change).sum(), rel_tol=1e-10)
    assert network.log_ridges.grad[0] == network.log_ridges.grad[2] == 0


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_neither_order_nor_passes_change_an_edit(family, make_model, requests, tmp_path):
    model = make_model(family)
    editor, _ = ready("malmen", model, tmp_path / "n", moved=0.3)
    whole = dense(editor.edit(model, requests), model)
    alone = editor(model, requests[::-1], micro_batch=1).edit.weights
    for name, other in dense(alone, model).items():
        close(other, whole[name], 1e-9)
    answers = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    tokens = sum(e.n_target for e in answers)
    (u,) = {part.factors()[0].shape[1] for part in editor.edit(model, requests).values()}
    assert u == tokens


def test_every_answer_token_counts_alike(make_model, requests):
    """Of MEND's rows, whose loss is a mean: as many times larger as the answer has tokens."""
    model = make_model("llama")
    answers = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    assert len({item.n_target for item in answers}) > 1
    ours, means = editor_of("malmen"), editor_of("mend")
    sites = ours.sites(model)  # the second is W2 of the last layer, which answers alone reach
    rows, others = (e.traced(model, sites, requests, 2) for e in (ours, means))
    for item, own, other in zip(answers, rows, others, strict=True):
        close(own[1].inputs, other[1].inputs)
        close(own[1].gradients, item.n_target * other[1].gradients)
