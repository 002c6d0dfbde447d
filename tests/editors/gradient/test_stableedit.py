"""StableEdit: whitening against its definition, and UltraEdit where there is none; in float64."""

from dataclasses import replace

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.gradient.moments import packed, unpacked
from kmebench.editors.gradient.stableedit import FLOOR, WhiteMoments
from kmebench.editors.gradient.ultraedit import loss_weights, warm_up
from kmebench.editors.needs import Pipeline, Trained
from kmebench.editors.rows import Rows
from kmebench.errors import ConfigError
from tests.editors.gradient.test_ultraedit import literal
from tests.pipelines.runs import killed_and_resumed

IN, OUT = 5, 3
#: Those of the literal rows of UltraEdit's tests, less what they say of the gate.
PLACES = {"value_layers": (1, 2), "key_layers": (1,), "learning_rate": 1e-3, "ridge": 2.0}


def stableedit(**hparams):
    return build_editor("stableedit", PLACES | hparams, {})


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    mixed = torch.randn(30, OUT).double() @ torch.randn(OUT, OUT).double()
    return Rows(3 * torch.randn(30, IN).double() + 1, mixed - 2)


def moments_of(rows, cuts=None):
    moments = WhiteMoments.none(rows)
    for part in rows.joined.split(cuts or len(rows.inputs)):
        moments = moments.with_rows(part)
    return moments


@pytest.mark.parametrize("cuts", [[30], [1] * 30, [3, 7, 15, 5]])
def test_the_scatter_of_parts_is_that_of_all_rows(cuts, rows):
    moments = moments_of(rows, cuts)
    close(moments.scatter, 29 * rows.gradients.T.cov())
    close(moments.mean, rows.joined.mean(dim=0))
    close(moments.deviation, rows.joined.std(dim=0))
    (back,) = unpacked(packed({rows.shape: moments}), WhiteMoments).values()
    assert torch.equal(back.scatter, moments.scatter)
    assert torch.equal(back.squares, moments.squares)


def test_whitened_gradients_have_the_covariance_of_independent_numbers(rows):
    inputs, gradients = rows.split(moments_of(rows).normalised(rows.joined))
    n = len(inputs)
    expected = torch.eye(OUT).double() * (n - OUT - 1) / n
    close(gradients.T @ gradients / n, expected)
    close(inputs.T @ inputs / n, inputs.T.cov() * (n - 1) / n)
    close(inputs.std(dim=0), torch.ones(IN).double(), 1e-6)


def test_of_gradients_that_do_not_go_together_it_is_ultraedits_scale(rows):
    """All signs of three numbers: their scatter is diagonal."""
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    apart = Rows(rows.inputs[:8], signs * torch.tensor([1.0, 2.0, 5.0]).double())
    moments = moments_of(apart)
    _, white = apart.split(moments.normalised(apart.joined))
    _, scaled = apart.split((apart.joined - moments.mean) / moments.deviation)
    close(white, scaled * ((8 - OUT - 1) / (8 - 1)) ** 0.5)


@pytest.mark.parametrize("n", [2, OUT, OUT + 1])
def test_of_few_rows_it_is_ultraedit(n, rows):
    few = Rows(rows.inputs[:n], rows.gradients[:n])
    moments = moments_of(few)
    assert moments.whitening is None
    plain = (few.joined - moments.mean) / (few.joined.std(dim=0) + 2.0**-23)
    close(moments.normalised(few.joined), plain)


def test_small_eigenvalues_count_as_the_floor(rows):
    flat = Rows(rows.inputs, rows.gradients * torch.tensor([1.0, 1.0, 0.0]).double())
    values = torch.linalg.eigvalsh(moments_of(flat).whitening)
    assert float(values[-1]) == pytest.approx(FLOOR**-0.5)


@pytest.mark.parametrize("family", ["gptj", "llama", "gpt2"])
def test_an_edit_is_the_equations_on_the_gradients_of_autograd(family, make_model, requests):
    model = make_model(family)
    targets = ("Rome", "Paris", "Fuji", "Japan", "the Paris of Italy", "flows through Seine")
    many = [replace(r, case_id=r.case_id + t, target_new=t) for t in targets for r in requests]
    delta = stableedit(micro_batch=2).edit(model, many)
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in many])
    weights = loss_weights([e.n_target for e in encoded], [len(e.ids) for e in encoded]).tolist()
    seen = literal(model, "gpt2", many, "mean", weights)  # W2 of 1 and 2, W1 of 1
    ffn = model.ffn
    for number, (projection, is_value) in enumerate(
        [(ffn[1].value, True), (ffn[2].value, True), (ffn[1].key, False)]
    ):
        rows, alike = seen[number], seen[:2] if is_value else seen[2:]
        h, g = (torch.cat(parts) for parts in zip(*alike, strict=True))
        n, n_out = g.shape
        assert n > n_out + 1
        sigma = (n - 1) * g.T.cov() / (n - n_out - 1)
        values, vectors = torch.linalg.eigh(sigma)
        root = vectors @ torch.diag(values.clamp(min=FLOOR) ** -0.5) @ vectors.T
        normal = (rows.inputs - h.mean(dim=0)) / h.std(dim=0)
        step = -1e-3 * normal.square().sum(1)[:, None] * ((rows.gradients - g.mean(0)) @ root)
        gram = rows.inputs.T @ rows.inputs + 2.0 * torch.eye(h.shape[1]).double()
        change = torch.linalg.solve(gram, rows.inputs.T @ step).T  # [out, in]
        found = delta[projection.weight_name].dense(projection.weight.shape)
        linear = found if (projection.axis == 1) == is_value else found.T
        scale = float(change.abs().max())
        torch.testing.assert_close(linear, change, rtol=1e-5, atol=1e-6 * scale)


def test_the_scatter_survives_a_killed_run_bit_by_bit(make_model, requests, tmp_path):
    def make():
        return make_model("llama", torch.float32), stableedit()

    _, state = killed_and_resumed(make, requests, tmp_path, 2)
    assert state.keys() >= {"24.16.scatter", "16.24.scatter"}


def test_the_warm_up_holds_the_scatter(make_model, requests, tmp_path):
    model, card = make_model("llama"), card_of("stableedit")
    (need,) = card.needs_of(card.values(PLACES | {"warm_up": 2}), Pipeline("batch", 3))
    assert isinstance(need, Trained)
    warm_up(tmp_path / "warm", model, requests, Trained.parse(need.name).settings)
    editor = build_editor("stableedit", PLACES | {"warm_up": 2}, {"trained": tmp_path / "warm"})
    once = stableedit()
    once.edit(model, requests[:2])
    assert all(torch.equal(t, once.state_dict()[k]) for k, t in editor.state_dict().items())
    with pytest.raises(ConfigError, match=r"^stableedit: warm_up asks for 2 requests .* has 1;"):
        warm_up(tmp_path / "few", model, requests[:1], need.settings)
