"""MEND's edits against autograd, in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kmebench.editors.base import build_editor
from kmebench.editors.gradient.moments import EPSILON
from kmebench.editors.hyper.training import Training
from kmebench.editors.rows import Rows
from kmebench.errors import ConfigError
from tests.conftest import FAMILIES
from tests.editors.hyper.networks import SMALL, editor_of, fresh, ready

GATED = ("llama", "qwen3", "gemma2", "gemma3_text")


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


def dense(delta, model):
    return {name: part.dense(model.parameter(name).shape) for name, part in delta.items()}


def gradients(model, request, names):
    """The gradient of a request's mean loss, by autograd and without padding."""
    (item,) = model.encode([(request.filled_prompt, request.target_new)])
    weights = [model.parameter(name).requires_grad_() for name in names]
    with torch.enable_grad():
        logits = model.model(torch.tensor([item.ids[:-1]])).logits[0, -item.n_target :]
        found = torch.autograd.grad(cross_entropy(logits, torch.tensor(item.target_ids)), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_network_steps_down_the_gradient(family, make_model, requests, tmp_path):
    """Requests together, padded, in passes of two; fused gates stay as they are."""
    model = make_model(family)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    gates = {"gate_layers": (1,)} if family in GATED else {}
    editor, _ = ready("mend", model, tmp_path / "n", micro_batch=2, step_size=1.0, **gates)
    found = dense(editor.edit(model, requests), model)
    assert all(torch.equal(before[name], p) for name, p in model.model.named_parameters())
    expected = dict.fromkeys(found, 0)
    for request in requests:
        for name, gradient in gradients(model, request, list(found)).items():
            expected[name] = expected[name] - gradient
    for site in editor.sites(model):
        projection, name = site.projection, site.projection.weight_name
        segments = projection.segments(found[name], projection.axis)
        whole = projection.segments(expected[name], projection.axis)
        close(segments * (1 + EPSILON) ** 2, whole)  # ε of the normalisation
        assert torch.equal(segments.norm(), found[name].norm())
    assert len(found) == 3 + len(gates)


def test_a_batch_is_the_sum_of_its_requests_and_no_more_than_its_tokens(
    make_model, requests, tmp_path
):
    model = make_model("llama")
    editor, _ = ready("mend", model, tmp_path / "n", moved=0.3)
    together = editor.edit(model, requests)
    alone = [dense(editor.edit(model, [request]), model) for request in requests]
    tokens = sum(
        len(e.ids) - 1 for e in model.encode([(r.filled_prompt, r.target_new) for r in requests])
    )
    for name, whole in dense(together, model).items():
        close(whole, sum(each[name] for each in alone))
        assert together[name].u.shape[1] <= tokens
    highest = together[model.ffn[2].value.weight_name]  # from it, answers alone reach the loss
    answers = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    assert highest.u.shape[1] == sum(e.n_target for e in answers)


def test_the_network_is_its_equations(make_model):
    network = fresh(editor_of("mend"), make_model("llama"), moved=0.3)
    torch.manual_seed(0)
    rows = Rows(torch.randn(5, 24).double(), torch.randn(5, 16).double())  # W2, seen at layer 2
    z = torch.cat(rows, dim=1) / (1 + EPSILON)
    for block in network.blocks["24x16"]:
        inner = block.up @ (block.down @ z.T) + block.bias[:, None]
        inner = block.scale[1][:, None] * inner + block.shift[1][:, None]
        assert 0 < (inner > 0).double().mean() < 1
        z = z + torch.where(inner > 0, inner, 0.0).T
    u, v = network.factors(1, rows)
    expected = sum(-network.step_sizes[1] * torch.outer(each[24:], each[:24]) for each in z)
    close(u @ v, expected)


def test_what_is_zero_at_the_start_learns(make_model, requests, tmp_path):
    editor, model = editor_of("mend", edits=1, groups=2), make_model("llama")
    training = Training(editor, model, requests, tmp_path / "partial", {}, 2)
    training.step(0)
    for name, parameter in training.network.named_parameters():
        if name.endswith(("up", "bias", "shift", "step_sizes")):
            assert parameter.grad.abs().max() > 0, name


def test_editing_leaves_moments_and_network_alone(make_model, requests, tmp_path):
    model = make_model("llama")
    editor, network = ready("mend", model, tmp_path / "n", moved=0.3)
    first = dense(editor.edit(model, requests), model)
    again = dense(editor.edit(model, requests), model)
    for name, tensor in network.tensors().items():
        assert torch.equal(editor._trained.tensors()[name], tensor)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert editor.state_dict() == {}


def test_the_default_layers_of_a_small_model_are_a_sentence(make_model, requests):
    with pytest.raises(ConfigError, match=r"mend: layers .* are not all among the model's 0 to 2"):
        build_editor("mend", {}, {}).edit(make_model("llama"), requests)
    with pytest.raises(ConfigError, match="malmen: the FFN of this model has no gate"):
        build_editor("malmen", SMALL | {"gate_layers": (1,)}, {}).edit(make_model("gptj"), requests)
