"""FT-L and FT-M: against Adam written out, their box, their stopping, and FT-L's floor."""

import dataclasses
import math

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.errors import ConfigError
from tests.conftest import FAMILIES, in_turn
from tests.editors.finetune.literal import after_the_prompt, fine_tuned, on_the_target

LOSSES = {"ft-m": on_the_target, "ft-l": after_the_prompt}
ANSWERS = ("Rome", "Paris", "Japan")
HPARAMS = {"layer": 1, "learning_rate": 0.01, "steps": 4, "tolerance": 0.0}


def ft(name, **hparams):
    return build_editor(name, HPARAMS | hparams, {})


def texts_of(model, requests):
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    return [(e.ids[: -e.n_target], e.target_ids) for e in encoded]


def losses_of(editor, model, requests):
    with torch.no_grad():
        return editor.losses(model, editor.encode(model, requests)).tolist()


def apart(model, requests, name):
    """Two requests, that of the smaller loss first, and their losses."""
    losses = losses_of(ft(name), model, requests)
    easy, hard = sorted(zip(losses, requests, strict=True), key=lambda pair: pair[0])[::2]
    assert hard[0] - easy[0] > 0.1
    return [easy[1], hard[1]], (easy[0], hard[0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("family", "bound"), in_turn([0.02, None]))
def test_ft_equals_adam_written_out(name, family, bound, make_model, requests):
    model = make_model(family)
    weight = model.ffn[1].value.weight_name
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    expected, _ = fine_tuned(
        model,
        [weight],
        texts_of(model, requests),
        LOSSES[name],
        lambda: ([0, 1], [2]),
        epochs=4,
        rate=0.01,
        bound=math.inf if bound is None else bound,
    )
    delta = ft(name, mini_batch=2, micro_batch=1, norm_constraint=bound).edit(model, requests)
    assert list(delta) == [weight]  # no bias, where there is one
    for n, parameter in model.model.named_parameters():
        assert torch.equal(before[n], parameter)
        assert parameter.grad is None
        assert not parameter.requires_grad
    model.apply(delta)
    torch.testing.assert_close(
        model.parameter(weight).detach(), expected[weight], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("above", [1e-3, -1e-3])
def test_a_group_whose_mean_is_learnt_is_not_stepped_on(name, above, make_model, requests):
    model = make_model("llama")
    two, losses = apart(model, requests, name)
    tolerance = sum(losses) / 2 + above
    editor = ft(name, mini_batch=2, tolerance=tolerance, steps=1)
    delta = editor.edit(model, two)
    assert editor.steps == (above < 0)  # whatever the worse of the two is
    assert any(part.values.any() for part in delta.values()) == (above < 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pass_whose_mean_is_learnt_is_the_last(name, make_model, requests):
    model = make_model("llama")
    two, losses = apart(model, requests, name)
    tolerance = sum(losses) / 2 + 1e-3
    editor = ft(name, tolerance=tolerance)
    model.apply(editor.edit(model, two))
    weight = model.ffn[1].value.weight_name
    edited = model.parameter(weight).detach().clone()
    model.revert()
    expected, steps = fine_tuned(
        model,
        [weight],
        texts_of(model, two),
        LOSSES[name],
        lambda: ([0], [1]),
        epochs=4,
        rate=0.01,
        tolerance=tolerance,
    )
    assert editor.steps == steps == 1  # the harder one, once
    torch.testing.assert_close(edited, expected[weight], rtol=1e-6, atol=1e-8)


def test_the_box_is_around_the_weights_before_this_edit(make_model, requests):
    model, editor = make_model("llama"), ft("ft-m", learning_rate=0.05, norm_constraint=0.02)
    weight, one_by_one = model.ffn[1].value.weight_name, []
    for request in (requests[0], dataclasses.replace(requests[0], target_new="Paris")):
        delta = editor.edit(model, [request])
        one_by_one.append(float(delta[weight].values.abs().max()))
        model.apply(delta)
    assert one_by_one == pytest.approx([0.02, 0.02])
    assert float(model.edits.total().weights[weight].values.abs().max()) > 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_one_token_are_the_same_to_both(family, make_model, requests):
    model = make_model(family, torch.float32)
    single = [dataclasses.replace(r, target_new=t) for r, t in zip(requests, ANSWERS, strict=True)]
    assert {len(target) for _, target in texts_of(model, single)} == {1}
    left, right = (ft(name, mini_batch=3).edit(model, single) for name in LOSSES)
    for name, part in left.items():
        assert part.values.any()
        assert torch.equal(part.values, right[name].values)


def test_ft_l_never_falls_below_the_entropy_of_the_targets_tokens(make_model, requests):
    """Its loss is H(q) + KL(q ‖ p), q the tokens of the target as one distribution."""
    model = make_model("llama")
    twice = [dataclasses.replace(requests[1], target_new="Paris Rome Paris")]
    ((prompt, target),) = texts_of(model, twice)
    assert len(set(target)) < len(target)
    log_p = model.model(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1).detach()
    q = torch.bincount(torch.tensor(target), minlength=len(log_p)).double() / len(target)
    entropy = -torch.xlogy(q, q).sum()
    divergence = torch.nn.functional.kl_div(log_p, q, reduction="sum")
    assert entropy > 0.5
    assert losses_of(ft("ft-l"), model, twice) == pytest.approx(
        [float(entropy + divergence)], rel=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_layer_that_does_not_exist_is_refused(name, make_model, requests):
    with pytest.raises(ConfigError, match=rf"{name}: layers \[21\] are not all among .* 0 to 2"):
        build_editor(name, {}, {}).edit(make_model("gptj"), requests[:1])
