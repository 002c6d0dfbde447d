"""Integrated gradients of neurons against a literal loop, and completeness."""

import pytest
import torch

from kmebench.editors.kn.attribution import attribute
from tests.conftest import FAMILIES, in_turn


def prompt_of(model, request):
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    return item.ids[: -item.n_target]


def neurons_of(model, ids, layer):
    seen = {}
    module = model.ffn[layer].value.module
    handle = module.register_forward_pre_hook(lambda m, i: seen.update(a=i[0][0, -1].clone()))
    model.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen["a"]


def probability(model, ids, layer, neurons, answer):
    """P of ``answer`` after the whole prompt, read from scratch, with other neurons at its end."""

    def replace(_module, inputs):
        x = inputs[0].clone()
        x[0, -1] = neurons
        return (x,)

    handle = model.ffn[layer].value.module.register_forward_pre_hook(replace)
    logits = model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits.softmax(dim=0)[answer]


def slope(model, ids, layer, neurons, answer):
    leaf = neurons.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(probability(model, ids, layer, leaf, answer), leaf)
    return gradient


# 7: layers share a batch, and are split.
@pytest.mark.parametrize(("family", "micro_batch"), in_turn([7, 1, 100]))
def test_attribution_equals_a_literal_loop_over_points(family, micro_batch, make_model, requests):
    model, answer, steps = make_model(family), 5, 4
    ids = prompt_of(model, requests[1])
    expected = []
    for layer in range(model.n_layers):
        a = neurons_of(model, ids, layer)
        points = [i / steps * a for i in range(1, steps + 1)]
        mean = sum(slope(model, ids, layer, point, answer) for point in points) / steps
        expected.append(a * mean)
    got = attribute(model, ids, answer, steps=steps, micro_batch=micro_batch)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_is_attributed(family, make_model):
    model = make_model(family)
    a = neurons_of(model, (7,), 1)
    got = attribute(model, (7,), 5, steps=1, micro_batch=2)
    torch.testing.assert_close(got[1], a * slope(model, (7,), 1, a, 5), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "gemma" not in f])
def test_attributions_of_a_layer_sum_to_the_probability_it_adds(family, make_model, requests):
    """With the error of the right Riemann sum, (f'(1) − f'(0)) / 2m + O(1/m²).

    A norm behind W2 forgets the common scale of all neurons: P jumps where they vanish.
    """
    model, answer = make_model(family), 5
    ids = prompt_of(model, requests[0])
    sums = {m: attribute(model, ids, answer, steps=m, micro_batch=300).sum(1) for m in (20, 200)}
    for layer in range(model.n_layers):
        a = neurons_of(model, ids, layer)
        ends = [probability(model, ids, layer, scale * a, answer) for scale in (0, 1)]
        slopes = [a @ slope(model, ids, layer, scale * a, answer) for scale in (0, 1)]
        bend = slopes[1] - slopes[0]
        errors = {m: total[layer] - (ends[1] - ends[0]) for m, total in sums.items()}
        for m, error in errors.items():
            assert (error - bend / (2 * m)).abs() < 5 * bend.abs() / m**2, (layer, m)
        assert errors[200].abs() < 0.15 * errors[20].abs()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_behind_a_norm_attribution_is_gradient_times_activation(family, make_model, requests):
    """Slopes at (i/m) a are m/i times those at a, so points add up to the harmonic number of m."""
    model, ids = make_model(family), prompt_of(make_model(family), requests[0])
    got = attribute(model, ids, 5, steps=4, micro_batch=300)
    for layer in range(model.n_layers):
        a = neurons_of(model, ids, layer)
        expected = (1 + 1 / 2 + 1 / 3 + 1 / 4) * a * slope(model, ids, layer, a, 5)
        torch.testing.assert_close(got[layer], expected, rtol=1e-3, atol=1e-6)


def test_attribution_leaves_no_hook_and_no_gradient(make_model, requests):
    model = make_model("llama", torch.float32)
    attribute(model, prompt_of(model, requests[0]), 5, steps=3, micro_batch=4)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_a_bfloat16_model_is_attributed_in_float32(make_model, requests):
    exact, model = make_model("llama", torch.float32), make_model("llama", torch.bfloat16)
    ids = prompt_of(model, requests[0])
    got = attribute(model, ids, 5, steps=20, micro_batch=100)
    expected = attribute(exact, ids, 5, steps=20, micro_batch=100)
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.95
