"""Keys and outputs at the subject's last token, against plain forward passes one by one."""

import pytest
import torch

from kmebench.data.records import EditRequest
from kmebench.editors.locate.keys import layer_outputs, module_outputs, subject_activations
from kmebench.models.encoding import SubjectText, encode_subjects
from tests.conftest import FAMILIES, in_turn

CONTEXTS = (("{}",), ("The Seine. {}", "I {} {. {}"), ("Paris stands in Mount Fuji. {}",))


def plain(model, request, prefix, module):
    """Input and output of ``module`` in a whole forward pass of one whole text."""
    seen = []
    handle = module.register_forward_hook(
        lambda m, i, kw, o: seen.append((i, kw, o)), with_kwargs=True
    )
    text = SubjectText(prefix, request.prompt, request.subject, request.target_new)
    item = encode_subjects(model.tokenizer, [text])[0]
    model.model(torch.tensor([item.ids]))
    handle.remove()
    args, kwargs, output = seen[0]
    states = args[0] if args else kwargs["hidden_states"]
    output = output[0] if isinstance(output, tuple) else output
    return states[0, item.subject_last], output[0, item.subject_last]


@pytest.mark.parametrize(("family", "micro_batch"), in_turn([1, 2, 50]))
def test_activations_are_means_inside_groups_then_over_groups(
    family, micro_batch, make_model, requests
):
    model = make_model(family)
    got = subject_activations(model, requests, CONTEXTS, 1, micro_batch)
    for i, request in enumerate(requests):
        groups = [
            [plain(model, request, c[:-2], model.ffn[1].value.module) for c in group]
            for group in CONTEXTS
        ]
        for values, side in ((got.keys[i], 0), (got.outputs[i], 1)):
            means = [sum(pair[side] for pair in group) / len(group) for group in groups]
            torch.testing.assert_close(values, sum(means) / 3, rtol=1e-10, atol=1e-10)


def test_one_flat_group_is_the_plain_mean(make_model, requests):
    model = make_model("gpt2")
    flat = (tuple(c for group in CONTEXTS for c in group),)
    got = subject_activations(model, requests, flat, 2, 50).keys[0]
    module = model.ffn[2].value.module
    every = [plain(model, requests[0], c[:-2], module)[0] for c in flat[0]]
    torch.testing.assert_close(got, torch.stack(every).mean(dim=0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_that_of_w2_with_its_bias(family, make_model, requests):
    model = make_model(family)
    got = subject_activations(model, requests, (("{}",),), 1, 2)
    value = model.ffn[1].value
    weight = value.weight if value.axis == 1 else value.weight.T  # [D, M]
    bias = 0 if value.bias_name is None else model.parameter(value.bias_name)
    torch.testing.assert_close(got.outputs, got.keys @ weight.T + bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_layers_and_attention_are_those_of_the_bare_prompt(family, make_model, requests):
    model = make_model(family)
    residual = layer_outputs(model, requests, 1, 2)
    attention = module_outputs(model, requests, model.attention[1], 2)
    for i, request in enumerate(requests):
        for got, module in ((residual, model.layers[1]), (attention, model.attention[1])):
            expected = plain(model, request, "", module)[1]
            torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-10)


def test_live_weights_are_read_and_later_layers_are_not_run(make_model, requests):
    model = make_model("llama")
    before = layer_outputs(model, requests, 1, 50)
    ran = []
    model.layers[2].register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        model.ffn[1].value.weight.mul_(2)
    assert not torch.allclose(layer_outputs(model, requests, 1, 50), before)
    subject_activations(model, requests, CONTEXTS, 1, 50)
    assert not ran


def test_bfloat16_models_are_averaged_in_float32(make_model, requests):
    model = make_model("gptj", torch.bfloat16)
    got = subject_activations(model, requests, CONTEXTS, 1, 50)
    assert got.keys.dtype == got.outputs.dtype == torch.float32
    assert layer_outputs(model, requests, 1, 50).dtype == torch.float32
    module = model.ffn[1].value.module
    groups = [[plain(model, requests[0], c[:-2], module)[0].float() for c in g] for g in CONTEXTS]
    mean = sum(sum(g) / len(g) for g in groups) / 3
    torch.testing.assert_close(got.keys[0], mean, rtol=0.05, atol=0.05)


def test_a_subject_that_stands_twice_is_read_in_its_slot(make_model):
    model = make_model("gptj")
    request = EditRequest("r", "Japan", "Japan and {}, Japan is", "Paris")
    got = layer_outputs(model, [request], 0, 1)[0]
    ids = model.tokenizer("Japan and Japan")["input_ids"]
    seen = []
    model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o[0]))
    model.model(torch.tensor([ids]))
    torch.testing.assert_close(got, seen[0][0, -1], rtol=1e-10, atol=1e-10)
