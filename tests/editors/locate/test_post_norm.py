"""What W2 has to say in front of a norm: reached where it can be, else the closest there is."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from kmebench.editors.locate.keys import layer_outputs, module_outputs
from kmebench.editors.locate.post_norm import value_change
from kmebench.editors.locate.targets import TargetSettings, _standing

SIZE = 40


@pytest.fixture
def norm(make_model):
    """Gemma's, whose gains are partly negative, and one nearly zero; in float64."""
    make_model("gemma3_text")  # makes its norms compute in float64
    torch.manual_seed(0)
    norm = Gemma3RMSNorm(SIZE, eps=1e-12).double().requires_grad_(False)
    norm.weight.normal_(std=0.8)
    norm.weight[3] = -1.0 + 1e-9
    return norm


@pytest.fixture
def outputs():
    torch.manual_seed(1)
    return 3.0 * torch.randn(5, SIZE, dtype=torch.float64)


def test_what_the_norm_can_add_is_added(norm, outputs):
    others = outputs + 4.0 * torch.randn_like(outputs)
    wanted = norm(others) - norm(outputs)
    change = value_change(norm, outputs, wanted)
    torch.testing.assert_close(norm(outputs + change), norm(others), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_of_what_it_cannot_add_the_closest_is(size, norm, outputs):
    """At the minimum the slope along the sphere of one length is zero; no other point is closer."""
    wanted = size * torch.randn_like(outputs)
    y = norm(outputs) + wanted
    after = (outputs + value_change(norm, outputs, wanted)).requires_grad_()
    torch.testing.assert_close(after.norm(dim=1), outputs.norm(dim=1))
    distance = (norm(after) - y).norm(dim=1)
    (slope,) = torch.autograd.grad(distance.sum(), after)
    assert float(slope.norm(dim=1).max()) < 1e-6
    for scale in (0.01, 0.1, 1.0, 10.0) * 50:
        other = after + scale * torch.randn_like(outputs)
        assert ((norm(other) - y).norm(dim=1) >= distance - 1e-9).all()


def test_no_change_is_asked_for_none(norm, outputs):
    change = value_change(norm, outputs, torch.zeros_like(outputs))
    torch.testing.assert_close(change, torch.zeros_like(outputs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_model_in_bfloat16_loses_no_digits_of_target_or_change(family, make_model, requests):
    """Both are differences of norms; in the model's own dtype they would be off by a thousandth."""
    model = make_model(family, torch.bfloat16)
    ffn = model.ffn[1]
    said = module_outputs(model, requests, ffn.value.module, 4)
    torch.manual_seed(0)
    after = said + 0.1 * said.norm(dim=1, keepdim=True) * torch.randn_like(said)

    def exactly(m):
        m, weight = m.double(), ffn.norm.weight.double()
        return m * (m.square().mean(dim=1, keepdim=True) + ffn.norm.eps).rsqrt() * (1.0 + weight)

    wanted = exactly(after) - exactly(said)
    settings = TargetSettings(1, "layer", 1, 0.1, 0.0, 0.0, 1.0)
    target = _standing(model, requests, settings, said, after)
    moved = target.double() - layer_outputs(model, requests, 1, 4).double()
    change = value_change(ffn.norm, said, wanted)
    coarse = (ffn.norm(after.bfloat16()) - ffn.norm(said.bfloat16())).double()
    misses = [moved - wanted, exactly(said + change) - exactly(after), coarse - wanted]
    exact, reached, rounded = (float(miss.norm() / wanted.norm()) for miss in misses)
    assert exact < 1e-5
    assert reached < 1e-5
    assert rounded > 1e-3
