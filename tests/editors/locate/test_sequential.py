"""MEMIT-seq and ENCORE: many calls are one call, and targets stop early; in float64."""

from dataclasses import replace

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.locate.covariance.factors import (
    cache_factor,
    damped_inverse,
    inverse_of,
    spectrum_of,
)
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.target_rows import Losses, TargetRows
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.editors.locate.updates import memit_update, with_keys
from kmebench.editors.needs import Inverse, Pipeline, Spectrum, Targets
from tests.pipelines.runs import killed_and_resumed

D, M, N = 5, 12, 7
SPLITS = ((7,), (1,) * 7, (3, 4), (1, 5, 1))
LAYER = 1
#: λ, λ_n and s of a run without early stop.
OWN = {
    "memit-seq": {"moment_weight": 2.5},
    "encore": {"moment_weight": 2.5, "norm_weight": 0.7, "said_steps": None},
}


@pytest.fixture
def given():
    torch.manual_seed(0)
    x = torch.randn(40, M).double()
    return {
        "covariance": x.T @ x / 40,
        "weight": torch.randn(D, M).double(),
        "keys": torch.randn(M, N).double(),
        "values": torch.randn(D, N).double(),
    }


def start_of(name, covariance):
    """(λC + λ_n I)⁻¹, and the matrix itself."""
    h = OWN[name]
    if name == "encore":
        added, spectrum = h["norm_weight"], spectrum_of(covariance)
        whole = h["moment_weight"] * covariance + added * torch.eye(M).double()
        return damped_inverse(spectrum, h["moment_weight"], added), whole
    return inverse_of(covariance) / h["moment_weight"], h["moment_weight"] * covariance


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("split", SPLITS)
def test_however_requests_are_split_the_weights_minimise_one_objective(name, split, given):
    inverse, penalty = start_of(name, given["covariance"])
    weight = given["weight"]
    parts = zip(given["keys"].split(split, 1), given["values"].split(split, 1), strict=True)
    for keys, values in parts:
        u, v = memit_update(values - weight @ keys, keys, inverse, 1.0)
        weight, inverse = weight + u @ v, with_keys(inverse, keys)
    tried = weight.clone().requires_grad_()
    moved = tried - given["weight"]
    objective = (moved @ penalty @ moved.T).trace()
    objective = objective + (tried @ given["keys"] - given["values"]).square().sum()
    (gradient,) = torch.autograd.grad(objective, tried)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    whole = penalty + given["keys"] @ given["keys"].T
    torch.testing.assert_close(inverse, torch.linalg.inv(whole), rtol=1e-11, atol=1e-12)


def test_plain_memit_depends_on_the_split(given):
    def after(split):
        weight, inverse = given["weight"], inverse_of(given["covariance"])
        parts = zip(given["keys"].split(split, 1), given["values"].split(split, 1), strict=True)
        for keys, values in parts:
            u, v = memit_update(values - weight @ keys, keys, inverse, 2.5)
            weight = weight + u @ v
        return weight

    assert not torch.allclose(after((7,)), after((1,) * 7), rtol=1e-3)


@pytest.fixture
def covariance(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(60, 24)
    write_covariance(tmp_path / "covariance", {LAYER: x.T @ x / 60}, 60, {"source": "self"})
    return tmp_path / "covariance"


@pytest.fixture
def fixed(monkeypatch, requests):
    """The bare prompt as the only context, and targets that are given."""
    torch.manual_seed(2)
    values = {r.case_id: torch.randn(16).double() for r in requests}
    monkeypatch.setattr("kmebench.editors.contexts.sample_contexts", lambda *_, **__: (("{}",),))
    monkeypatch.setattr(
        "kmebench.editors.locate.memit.MEMIT._targets",
        lambda self, model, asked: torch.stack([values[r.case_id] for r in asked]),
    )


def editor_of(name, covariance, **hparams):
    assets = {"covariance": covariance}
    return build_editor(name, OWN.get(name, {}) | {"layers": (LAYER,)} | hparams, assets)


def edited(editor, model, calls):
    """W2 of the layer after some calls, and the model as it was."""
    for requests in calls:
        model.apply(editor(model, requests).edit)
    weight = model.ffn[LAYER].value.weight.detach().clone()
    model.revert()
    return weight


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", ["gptj", "llama", "gpt2"])
def test_one_call_is_as_many_calls_as_there_are_requests(
    family, name, make_model, requests, covariance, fixed
):
    model = make_model(family)
    before = model.ffn[LAYER].value.weight.detach().clone()
    together = edited(editor_of(name, covariance), model, [requests])
    for calls in ([[r] for r in requests], [requests[:2], requests[2:]]):
        found = edited(editor_of(name, covariance), model, calls)
        torch.testing.assert_close(found, together, rtol=1e-12, atol=1e-12)
    assert (together - before).abs().max() > 0.1


def test_the_first_call_of_memit_seq_is_memits(make_model, requests, covariance, fixed):
    model = make_model("llama")
    first = edited(editor_of("memit-seq", covariance), model, [requests])
    memit = edited(editor_of("memit", covariance, moment_weight=2.5), model, [requests])
    torch.testing.assert_close(first, memit, rtol=1e-12, atol=1e-12)


def test_without_its_restraints_encore_is_memit_seq_bit_by_bit(
    make_model, requests, covariance, monkeypatch
):
    model = make_model("llama")
    loss = {"steps": 3, "weight_decay": 0.5, "clamp_factor": 0.75, "moment_weight": 2.5}
    free = {"norm_weight": 0.0, "said_steps": None}
    calls = [requests[:1], requests[1:]]
    encore = edited(editor_of("encore", covariance, **loss, **free), model, calls)
    assert torch.equal(encore, edited(editor_of("memit-seq", covariance, **loss), model, calls))


def test_the_change_shrinks_as_the_weight_of_its_norm_grows(
    make_model, requests, covariance, fixed
):
    model = make_model("llama")
    before = model.ffn[LAYER].value.weight.detach().clone()
    norms = [
        float(
            (
                edited(editor_of("encore", covariance, norm_weight=x), model, [requests]) - before
            ).norm()
        )
        for x in (0.0, 0.1, 1.0, 10.0, 100.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.5 * norms[0]


@pytest.mark.parametrize(("norm_weight", "kind"), [(0.0, Inverse), (10.0, Spectrum)])
def test_encore_reads_what_it_inverts(
    norm_weight, kind, make_model, requests, covariance, fixed, tmp_path
):
    editor = editor_of("encore", covariance, norm_weight=norm_weight)
    factor, targets = card_of("encore").needs_of(editor.hparams, Pipeline("batch", 3))
    assert factor == kind(LAYER)
    assert isinstance(targets, Targets)
    assert "said_steps" not in targets.name
    cache_factor(tmp_path / "factor", covariance, factor.factor, LAYER)
    values = OWN["encore"] | {"layers": (LAYER,), "norm_weight": norm_weight}
    cached = build_editor("encore", values, {factor.key: tmp_path / "factor"})
    model = make_model("llama")
    found, expected = (edited(each, model, [requests]) for each in (cached, editor))
    assert torch.equal(found, expected)


def test_targets_that_stop_early_are_files_of_their_own():
    card = card_of("encore")
    *_, early = card.needs_of(card.values({"said_steps": 4}), Pipeline("batch", 3))
    *_, late = card.needs_of(card.values({"said_steps": None}), Pipeline("batch", 3))
    assert early.name == late.name + "+said_steps=4"
    assert Targets.parse(early.name) == early
    assert Targets.parse(late.name) == late


@pytest.mark.parametrize(("said_steps", "updates"), [(1, 1), (2, 2), (3, 4), (4, 6), (None, 6)])
def test_a_target_ends_with_the_pass_in_which_it_was_said_so_often(
    said_steps, updates, make_model, requests, monkeypatch
):
    """Every context says it in passes 2, 3 and 5 of 7: the third is pass 5, after 4 updates."""
    said, passes = {2, 3, 5}, []
    losses = TargetRows.losses

    def scripted(self, deltas):
        passes.append(len(self.encoded))
        found = losses(self, deltas)
        known = torch.full_like(found.said, len(passes) in said)
        return Losses(found.nll, found.kl, known)

    monkeypatch.setattr(TargetRows, "losses", scripted)
    settings = TargetSettings(1, "layer", 7, 0.1, 0.0625, 0.5, 0.75, said_steps=said_steps)
    found = optimise_targets(
        make_model("llama"), requests[:1], (("{}",),), replace(settings, stop_loss=0.0), "encore"
    )
    assert found.steps.tolist() == [updates]
    assert len(passes) == updates + 1


def test_requests_are_counted_apart(make_model, requests, monkeypatch):
    """The second request is always said, the first and the third never."""
    losses = TargetRows.losses
    second = requests[1].target_new

    def scripted(self, deltas):
        found = losses(self, deltas)
        model = self.replay.model
        targets = [model.tokenizer.decode(group[0].target_ids).strip() for group in self.encoded]
        return Losses(found.nll, found.kl, torch.tensor([t == second for t in targets]))

    monkeypatch.setattr(TargetRows, "losses", scripted)
    settings = TargetSettings(1, "layer", 5, 0.1, 0.0625, 0.5, 0.75, said_steps=2, stop_loss=0.0)
    found = optimise_targets(make_model("llama"), requests, (("{}",),), settings, "encore")
    assert found.steps.tolist() == [4, 1, 4]


@pytest.mark.parametrize("name", OWN)
def test_a_killed_run_in_turns_goes_on_with_the_same_bytes(
    name, make_model, requests, covariance, tmp_path
):
    def make():
        return make_model("gptj", torch.float32), editor_of(name, covariance, steps=2)

    _, state = killed_and_resumed(make, requests, tmp_path, 2)
    assert state.keys() == {"contexts", f"kept.{LAYER}"}
