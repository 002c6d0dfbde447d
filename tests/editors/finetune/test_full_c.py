"""Full-C: the constraint, and projected Adam against a literal implementation."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.errors import ConfigError
from tests.conftest import in_turn

HPARAMS = {"learning_rate": 0.01, "norm_constraint": 0.02, "steps": 4, "tolerance": 0.0}


def edited(model, requests, **hparams):
    editor = build_editor("full-c", HPARAMS | hparams, {})
    for request in requests:
        model.apply(editor.edit(model, [request]))
    return model.edits.total().weights


@pytest.mark.parametrize(("family", "mini_batch"), in_turn([None, 2]))
def test_full_c_equals_projected_adam(family, mini_batch, make_model, requests):
    model = make_model(family)
    names = [p.weight_name for f in model.ffn for p in (f.key, f.value)]
    weights = {n: model.parameter(n).clone().requires_grad_() for n in names}
    original = {n: w.detach().clone() for n, w in weights.items()}
    adam = torch.optim.Adam(weights.values(), lr=HPARAMS["learning_rate"])
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    torch.manual_seed(1)
    for _ in range(HPARAMS["steps"]):
        groups = [range(3)] if mini_batch is None else torch.randperm(3).split(mini_batch)
        for group in groups:
            adam.zero_grad()
            for item in (encoded[i] for i in group):
                logits = torch.func.functional_call(
                    model.model, weights, kwargs={"input_ids": torch.tensor([item.ids])}
                ).logits[0, -item.n_target - 1 : -1]
                (cross_entropy(logits, torch.tensor(item.target_ids)) / len(group)).backward()
            if family == "phi3":  # the first half of W1's rows is the gate
                for name in names[::2]:
                    weights[name].grad[: model.ffn_width] = 0
            adam.step()
            with torch.no_grad():
                for name, weight in weights.items():
                    change = weight - original[name]
                    weight.copy_(original[name] + change.clamp(-0.02, 0.02))
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    torch.manual_seed(1)
    hparams = HPARAMS | {"micro_batch": 2, "mini_batch": mini_batch}
    delta = build_editor("full-c", hparams, {}).edit(model, requests)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    model.apply(delta)
    for name in names:
        # Llama's RMSNorm computes in float32 whatever the dtype; Adam magnifies that noise
        # where a gradient nearly vanishes.
        torch.testing.assert_close(
            model.parameter(name).detach(), weights[name].detach(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consecutive_edits_stay_in_one_box_around_the_original(dtype, make_model, requests):
    model = make_model("llama", dtype)
    total = edited(model, requests, learning_rate=0.05)
    largest = max(float(part.values.abs().max()) for part in total.values())
    assert largest == pytest.approx(0.02, rel=1e-3)


def test_without_constraint_weights_leave_the_box(make_model, requests):
    model = make_model("llama", torch.float32)
    total = edited(model, requests, learning_rate=0.05, norm_constraint=None)
    assert max(float(part.values.abs().max()) for part in total.values()) > 0.05


def test_value_projection_of_chosen_layers_alone(make_model, requests):
    model = make_model("gptj", torch.float32)
    total = edited(model, requests[:1], layers=(1,), projections="value")
    assert list(total) == [model.ffn[1].value.weight_name]


def test_a_layer_that_does_not_exist_is_refused(make_model, requests):
    with pytest.raises(ConfigError, match=r"full-c: layers \[7\] .* 0 to 2; set its layers"):
        edited(make_model("gptj"), requests[:1], layers=(7,))


def test_what_is_learnt_is_not_stepped_on(make_model, requests):
    model = make_model("llama", torch.float32)
    easy = {"tolerance": 1e9, "mini_batch": 2, "micro_batch": 1}
    editor = build_editor("full-c", HPARAMS | easy, {})
    delta = editor.edit(model, requests)
    assert editor.steps == 0
    assert not any(part.values.any() for part in delta.values())


def test_no_gradient_is_left_behind(make_model, requests):
    model = make_model("llama", torch.float32)
    build_editor("full-c", HPARAMS, {}).edit(model, requests[:1])
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
