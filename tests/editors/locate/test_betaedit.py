"""BetaEdit against its equation in M dimensions, with a projection that is refreshed."""

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.needs import Pipeline, Spectrum, Targets
from kmebench.errors import ConfigError
from tests.pipelines.runs import killed_and_resumed

D, M, LAYER = 16, 24, 1
HPARAMS = {"layers": (LAYER,), "threshold": 0.8, "ridge": 0.5, "steps": 2}
WEIGHT = 3.0


@pytest.fixture
def covariance(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(60, M)
    write_covariance(tmp_path / "covariance", {LAYER: x.T @ x / 60}, 60, {"source": "self"})
    return tmp_path / "covariance"


def editor_of(name, covariance, **hparams):
    return build_editor(name, HPARAMS | hparams, {"covariance": covariance})


def dense_c(covariance, model):
    return editor_of("betaedit", covariance).covariance(model, LAYER).double()


def projector(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    free = vectors[:, values < 0.8]
    return free @ free.T


@pytest.mark.parametrize("sizes", [(1,) * 7, (2, 1, 3, 1), (4, 4)])
@pytest.mark.parametrize("refresh", [2, 3, 100])
def test_every_call_solves_the_equation_with_the_projection_of_its_time(
    sizes, refresh, make_model, covariance
):
    """As released: the sums run on, and a call refreshes that finds enough edits since the last."""
    model = make_model("llama")
    editor = editor_of("betaedit", covariance, moment_weight=WEIGHT, refresh_edits=refresh)
    c = dense_c(covariance, model)
    projection, cache, done, last = projector(c), torch.zeros(M, M).double(), 0, 0
    torch.manual_seed(0)
    for size in sizes:
        keys, residual = torch.randn(M, size).double(), torch.randn(D, size).double()
        if done - last >= refresh:
            projection = projector((cache / done + WEIGHT * c) / (WEIGHT + 1))
            last = done
        left = projection @ (keys @ keys.T + cache + WEIGHT * c) + 0.5 * torch.eye(M).double()
        expected = torch.linalg.solve(left, projection @ keys @ residual.T).T
        u, v = editor._solve(model, LAYER, residual, keys)
        torch.testing.assert_close(u @ v, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(u @ v @ projection, u @ v, rtol=1e-9, atol=1e-11)
        cache, done = cache + keys @ keys.T, done + size
    assert (last > 0) == (refresh < 100)


def test_without_the_covariance_and_a_refresh_it_is_alphaedit_bit_by_bit(
    make_model, requests, covariance
):
    changes = []
    for name, own in (("alphaedit", {}), ("betaedit", {"moment_weight": 0.0})):
        model, editor = make_model("gpt2"), editor_of(name, covariance, **own)
        for request in requests:
            model.apply(editor(model, [request]).edit)
        changes.append(model.edits.total().weights)
    for name, part in changes[0].items():
        assert torch.equal(part.values, changes[1][name].values)


@pytest.mark.parametrize("name", ["alphaedit", "betaedit"])
def test_a_restored_editor_sums_its_keys_in_the_same_order(name, make_model, covariance):
    """Calls of several requests: one sum over all keys would have other bits."""
    model, done = make_model("llama"), editor_of(name, covariance)
    torch.manual_seed(0)
    calls = [(torch.randn(D, n).double(), torch.randn(M, n).double()) for n in (3, 2, 4)]
    for call in calls[:2]:
        done._solve(model, LAYER, *call)
    restored = editor_of(name, covariance)
    restored.load_state_dict(done.state_dict())
    for first, second in zip(
        done._solve(model, LAYER, *calls[2]), restored._solve(model, LAYER, *calls[2]), strict=True
    ):
        assert torch.equal(first, second)


def test_the_heavier_the_covariance_the_less_of_it_is_disturbed(make_model, requests, covariance):
    model, disturbed = make_model("llama"), []
    c = dense_c(covariance, model)
    for weight in (0.0, 3.0, 300.0):
        editor = editor_of("betaedit", covariance, moment_weight=weight)
        (part,) = editor(model, requests).edit.weights.values()
        change = part.dense(torch.Size((D, M)))
        disturbed.append(float((change @ c @ change.T).trace()))
    assert disturbed[0] > disturbed[1] > disturbed[2] > 0


@pytest.mark.parametrize("refresh", [1, 2])
def test_a_killed_run_goes_on_with_the_same_bytes(
    refresh, make_model, requests, covariance, tmp_path
):
    def make():
        editor = editor_of("betaedit", covariance, refresh_edits=refresh)
        return make_model("gptj", torch.float32), editor

    _, state = killed_and_resumed(make, requests, tmp_path)
    assert state[f"known.{LAYER}"] == 2


def test_a_reset_editor_knows_no_earlier_edit(make_model, requests, covariance):
    model, editor = make_model("llama"), editor_of("betaedit", covariance, refresh_edits=1)
    first = editor(model, requests[:1]).edit
    editor(model, requests[1:2])
    editor.load_state_dict({})
    again = editor(model, requests[:1]).edit
    for name, part in first.weights.items():
        assert torch.equal(part.u, again.weights[name].u)
        assert torch.equal(part.v, again.weights[name].v)


def test_the_state_of_another_run_brings_its_own_projection(make_model, covariance):
    model = make_model("llama")
    torch.manual_seed(2)
    editors = [editor_of("betaedit", covariance, refresh_edits=2) for _ in range(3)]
    for editor in editors[:2]:  # as many edits, of other keys
        for _ in range(3):
            editor._solve(model, LAYER, torch.randn(D, 1).double(), torch.randn(M, 1).double())
    state = editors[1].state_dict()
    keys, residual = torch.randn(M, 1).double(), torch.randn(D, 1).double()
    for editor in (editors[0], editors[2]):
        editor.load_state_dict(state)
    first, fresh = (e._solve(model, LAYER, residual, keys) for e in (editors[0], editors[2]))
    assert torch.equal(first.u @ first.v, fresh.u @ fresh.v)


def test_it_reads_the_spectrum_and_memits_targets_and_needs_a_ridge():
    card = card_of("betaedit")
    spectrum, targets = card.needs_of(card.values({"layers": [3]}), Pipeline("batch", 5))
    assert spectrum == Spectrum(3)
    assert isinstance(targets, Targets)
    with pytest.raises(ConfigError, match="ridge cannot be 0"):
        card.values({"ridge": 0})
