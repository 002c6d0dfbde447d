"""NAS: values scaled as a literal transcription does it, one request at a time; in float64."""

from dataclasses import replace

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.editors.cards import card_of
from kmebench.editors.locate.anchor import FORMAT, Anchor, trimmed_mean
from kmebench.editors.locate.anchor_stage import measure
from kmebench.editors.locate.covariance.store import write_covariance
from kmebench.editors.locate.keys import subject_activations
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.editors.needs import Pipeline, Targets, Trained
from kmebench.errors import ConfigError
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.models.encoding import SubjectText
from kmebench.pipelines.pipelines import Setup, run_batches
from tests.conftest import FAMILIES, without_word
from tests.pipelines.runs import SETTINGS, checkpoints, comparable, killed_and_resumed

LAYER = 1
CONTEXTS = (("{}",), ("The Seine. {}",))
LOSS = TargetSettings(LAYER, "layer", 5, 0.5, 0.0625, 1e-3, 4.0)
PLAIN = [family for family in FAMILIES if "gemma" not in family]
NORMED = [family for family in FAMILIES if "gemma" in family]
METHODS = [
    *("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit"),
    *("memit-seq", "encore", "prune", "rect"),
]


def said_by(module, model, request):
    """What a module says at the subject of the bare prompt, [D]."""
    (item,) = model.encode_subjects([SubjectText("", request.prompt, request.subject, None)])
    seen = []

    def see(_m, _i, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0, item.subject_last])

    with module.register_forward_hook(see), torch.no_grad():
        model.model(torch.tensor([item.ids]))
    return seen[0]


def value_of(model):
    return model.ffn[LAYER].value.module


def transcribed(delta, start, v0, mean, guard):
    """The release's lines (NAS/compute_z.py, baselines/rome/compute_v.py), in our names."""
    before = start - v0
    v_star = delta + v0
    v_star = v0 if v_star.norm().item() > guard * mean else v_star * (mean / v_star.norm().item())
    return before + v_star


def optimised(model, requests, site="layer", anchor=None, **changed):
    settings = replace(LOSS, site=site, anchor=anchor, **changed)
    return optimise_targets(model, requests, CONTEXTS, settings, "memit")


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("site", ["layer", "value", "attention-value"])
def test_targets_are_those_of_the_release(family, site, make_model, requests):
    model = make_model(family)
    free = optimised(model, requests, site)
    v0 = torch.stack([said_by(value_of(model), model, r) for r in requests])
    longest = (v0 + free.deltas).norm(dim=1).sort().values
    guard = 2.0
    mean = float(longest[-2:].mean()) / guard  # the longest of the three is given up
    found = optimised(model, requests, site, Anchor(mean, guard))
    for i in range(len(requests)):
        expected = transcribed(free.deltas[i], free.start[i], v0[i], mean, guard)
        torch.testing.assert_close(found.values[i], expected, rtol=1e-12, atol=1e-12)
        if found.given_up[i]:
            assert torch.equal(found.values[i], found.start[i])
            continue
        v = found.values[i] - (found.start[i] - v0[i])
        assert float(v.norm()) == pytest.approx(mean, rel=1e-12)
        cosine = torch.cosine_similarity(v, v0[i] + free.deltas[i], dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-12)
    assert found.given_up.sum() == 1
    assert torch.equal(found.steps, free.steps)


@pytest.mark.parametrize("family", NORMED)
def test_behind_a_norm_the_length_is_that_of_what_w2_says(family, make_model, requests):
    model, norm = make_model(family), make_model(family).ffn[LAYER].norm
    free = optimised(model, requests)
    found = optimised(model, requests, anchor=Anchor(3.0, 100.0))
    for i, request in enumerate(requests):
        m, h = (said_by(x, model, request) for x in (value_of(model), model.layers[LAYER]))
        v = m + free.deltas[i]
        expected = h + norm(3.0 * v / v.norm()) - norm(m)
        torch.testing.assert_close(found.values[i], expected, rtol=1e-10, atol=1e-10)


def test_scaling_twice_is_scaling_once_and_the_right_length_keeps_its_bits():
    torch.manual_seed(0)
    deltas, said = torch.randn(2, 6, 16).double()
    anchor = Anchor(2.5, 4.0)
    once, _ = anchor.scaled(deltas, said)
    twice, given_up = anchor.scaled(once, said)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-14)
    assert not given_up.any()
    deltas, said = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert torch.equal(Anchor(5.0, 2.0).scaled(deltas, said)[0], deltas)


@pytest.mark.parametrize(("guard", "given_up"), [(2.0, False), (1.99, True)])
def test_a_value_is_given_up_beyond_the_guard(guard, given_up):
    deltas, said = torch.tensor([[6.0, 4.0]]), torch.tensor([[0.0, 4.0]])  # of length 10
    scaled, found = Anchor(5.0, guard).scaled(deltas, said)
    assert found.tolist() == [given_up]
    assert scaled.tolist() == ([[0.0, 0.0]] if given_up else [[3.0, 0.0]])


# -- the stage --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dropped"), [(19, 0), (20, 1), (39, 1), (1000, 50)])
def test_the_largest_twentieth_is_dropped(count, dropped):
    lengths = torch.arange(count, dtype=torch.float64)
    kept = range(count - dropped)
    assert trimmed_mean(lengths.flip(0)) == pytest.approx(sum(kept) / len(kept))


@pytest.fixture
def needed(requests):
    card = card_of("memit")
    values = {"layers": (LAYER,), "steps": 5, "anchor": len(requests)}
    return card.needs_of(card.values(values), Pipeline("consecutive", 1))[-1]


@pytest.mark.parametrize("family", ["gptj", "gemma3_text"])
def test_lengths_are_those_of_values_of_the_bare_prompt(
    family, needed, make_model, requests, tmp_path
):
    model = make_model(family)
    assert isinstance(needed, Trained)
    measure(tmp_path / "a", model, requests, Trained.parse(needed.name).settings)
    lengths = TensorFile.open(tmp_path / "a", FORMAT).tensor("lengths")
    for length, request in zip(lengths, requests, strict=True):
        settings = replace(LOSS, layer=LAYER)
        own = optimise_targets(model, [request], (("{}",),), settings, "memit")
        v = said_by(value_of(model), model, request) + own.deltas[0]
        assert float(length) == pytest.approx(float(v.norm()), rel=1e-9)
    assert Anchor.open(tmp_path / "a", 2.0).length == pytest.approx(float(lengths.mean()))


def test_too_few_development_records_are_a_sentence(needed, make_model, requests, tmp_path):
    with pytest.raises(ConfigError, match=r"anchor asks for 3 .* which has 2; lower anchor, or"):
        measure(tmp_path / "a", make_model("gptj"), requests[:2], needed.settings)


@pytest.mark.parametrize("good", [19, 18])
def test_a_value_that_diverged_counts_as_the_longest(good, needed, make_model, requests, tmp_path):
    model = without_word(make_model("gptj"), " Japan")
    asked = [requests[0]] * good + [requests[1]] * (20 - good)
    measure(tmp_path / "a", model, asked, {**needed.settings, "records": 20})
    if good == 19:
        measure(tmp_path / "b", model, asked[:1], {**needed.settings, "records": 1})
        expected = Anchor.open(tmp_path / "b", 2.0).length
        assert Anchor.open(tmp_path / "a", 2.0).length == pytest.approx(expected, rel=1e-9)
    else:
        with pytest.raises(ConfigError, match=r"of 20 .*, 2 became NaN or infinite; lower learn"):
            Anchor.open(tmp_path / "a", 2.0)


@pytest.mark.parametrize("method", METHODS)
def test_lengths_do_not_depend_on_what_the_editor_is(method):
    """MEMIT's loss whichever editor asks; without NAS nothing is asked for."""
    card, layer = card_of(method), {"layer": 3} if "rome" in method else {"layers": (2, 3)}
    loss = {"learning_rate": 0.3, "steps": 9, "weight_decay": 0.5, "clamp_factor": 0.75}
    for mode in ("batch", "consecutive"):
        pipeline = Pipeline(mode, 3)
        values = card.values(layer | loss | {"anchor": 100})
        *others, need = card.needs_of(values, pipeline)
        assert (
            need.settings
            == {
                "records": 100,
                "layer": 3,
                "kl_factor": 0.0625,
                "kl_position": "subject_last",
                "stop_loss": 0.05,
            }
            | loss
        )
        assert not any(isinstance(other, Trained | Targets) for other in others)
        off = card.needs_of(card.values(layer | loss), pipeline)
        assert not any(isinstance(other, Trained) for other in off)
    assert values.anchor_guard == (5.0 if "rome" in method else 2.0)


# -- editors ----------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(60, 24)
    write_covariance(tmp_path / "covariance", {LAYER: x.T @ x / 60}, 60, {"source": "self"})

    def with_length(length):
        write_tensors(tmp_path / "anchor", {"lengths": torch.tensor([length]).double()}, FORMAT, {})
        return {"covariance": tmp_path / "covariance", "trained": tmp_path / "anchor"}

    return with_length


def editor_of(method, assets, **values):
    layer = {"layer": LAYER} if "rome" in method else {"layers": (LAYER,)}
    own = {"threshold": 10.0} if method == "alphaedit" else {}
    return build_editor(method, {"steps": 4, "anchor": 1} | layer | own | values, assets)


def test_r_rome_writes_a_value_of_the_length_at_its_averaged_key(make_model, requests, assets):
    model, editor = make_model("llama"), editor_of("r-rome", assets(1.5))
    model.apply(editor(model, requests[:1]).edit)
    contexts = (tuple(t for group in editor.contexts(model) for t in group),)
    model.revert()
    key = subject_activations(model, requests[:1], contexts, LAYER, 1).keys[0]
    model.apply(editor(model, requests[:1]).edit)
    said = value_of(model)(key)
    assert float(said.norm()) == pytest.approx(1.5, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_that_is_given_up_changes_nothing(method, make_model, requests, assets):
    model = make_model("llama")
    before = value_of(model).weight.detach().clone()
    for request in requests:
        result = editor_of(method, assets(1e-3))(model, [request])
        model.apply(result.edit)
        assert torch.equal(value_of(model).weight, before)
        assert result.steps > 0


@pytest.mark.parametrize("method", METHODS)
def test_edits_have_one_length_however_far_the_model_is_edited(
    method, make_model, requests, assets, monkeypatch
):
    """Values grow without NAS on a model whose weights have grown; with it they do not."""
    seen = []

    def noted(module):
        def optimise(model, asked, contexts, settings, editor):
            found = optimise_targets(model, asked, contexts, settings, editor)
            said = torch.stack([said_by(value_of(model), model, r) for r in asked])
            seen.extend((said + found.deltas).norm(dim=1).tolist())
            return found

        monkeypatch.setattr(f"kmebench.editors.locate.{module}.optimise_targets", optimise)

    noted("rome")
    noted("memit")
    model, editor = make_model("llama"), editor_of(method, assets(1.5), anchor_guard=1e6)
    for request in requests:
        model.apply(editor(model, [request]).edit)
        with torch.no_grad():
            value_of(model).weight.mul_(3.0)
    assert seen == pytest.approx([1.5] * 3, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_without_nas_no_length_is_read(method, make_model, requests, assets):
    found = {key: path for key, path in assets(1.5).items() if key != "trained"}
    editor = editor_of(method, found, anchor=None)
    assert editor(make_model("gptj"), requests[:1]).edit


@pytest.mark.parametrize("method", ["alphaedit", "rome"])
def test_a_killed_run_in_turns_goes_on_with_the_same_bytes(
    method, make_model, requests, assets, tmp_path
):
    def make():
        return make_model("gptj", torch.float32), editor_of(method, assets(1.5))

    killed_and_resumed(make, requests, tmp_path, 2)


def test_a_batch_starts_from_the_length_again(make_model, requests, assets, tmp_path):
    """Two batches are as if each had been the only one."""
    model = make_model("gptj", torch.float32)
    setup = Setup(model, editor_of("alphaedit", assets(1.5)), SETTINGS, checkpoints(tmp_path / "a"))
    both = run_batches(setup, requests[:2], 1).predictions
    setup = Setup(model, editor_of("alphaedit", assets(1.5)), SETTINGS, checkpoints(tmp_path / "b"))
    second = run_batches(setup, requests[1:2], 1).predictions
    own = both[both["case_id"] == requests[1].case_id].drop(columns=["position", "batch"])
    found = comparable(second.drop(columns=["position", "batch"])).reset_index(drop=True)
    assert comparable(own).reset_index(drop=True).equals(found)
