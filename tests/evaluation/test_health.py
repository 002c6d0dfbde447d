"""Health on neutral text against a plain forward pass of transformers."""

import math
from dataclasses import dataclass

import pytest
import torch

from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Overlay
from kmebench.edits.weights import Dense, WeightDelta
from kmebench.errors import KMEBenchError
from kmebench.evaluation.health import NeutralSettings, NeutralText, health
from kmebench.evaluation.protocols import metrics_of
from kmebench.io.tensors import write_tensors
from kmebench.models.sampling import sample
from tests.conftest import FAMILIES

SETTINGS = NeutralSettings(texts=5, length=12, seed=3)


def changed(model, name=None, size=0.2):
    """An edit of one FFN matrix, or of any parameter, by noise."""
    name = name or model.ffn[1].value.weight_name
    generator = torch.Generator().manual_seed(1)
    shape = model.parameter(name).shape
    noise = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    return WeightDelta({name: Dense(noise.to(model.parameter(name).dtype))})


@torch.no_grad()
def naive(model, ids):
    """log p of all next tokens at all positions but the last, [R, T, V], without batching."""
    return torch.cat([model.model(row[None]).logits[:, :-1].log_softmax(-1) for row in ids])


def expected(before, after, ids):
    """What health should be, by the definitions, of log-probabilities [R, T, V]."""
    labels = ids[:, 1:, None]
    nll0, nll = (-logs.gather(-1, labels).mean().item() for logs in (before, after))
    return {
        "tokens": labels.numel(),
        "perplexity": math.exp(nll),
        "perplexity_ratio": math.exp(nll) / math.exp(nll0),
        "nll_difference": nll - nll0,
        "kl": (before.exp() * (before - after)).sum(-1).mean().item(),
        "same_argmax": (before.argmax(-1) == after.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_state_is_measured_as_a_plain_forward_pass_says(family, make_model):
    model = make_model(family)
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=2)
    assert neutral.ids.tolist() == sample(model, 5, 13, seed=3).tolist()
    before = naive(model, neutral.ids)
    model.apply(changed(model))
    found = health(model, neutral, batch_size=3)
    assert found == pytest.approx(expected(before, naive(model, neutral.ids), neutral.ids), 1e-9)
    assert found["kl"] > 0.01
    assert found["same_argmax"] < 1
    assert set(found) >= {column for m in metrics_of("state") for column in m.columns}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unedited_model_is_exactly_itself_also_after_a_revert(family, dtype, make_model):
    model = make_model(family, dtype)
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=2)
    for _ in range(2):
        found = health(model, neutral, batch_size=2)
        assert found["perplexity_ratio"] == found["same_argmax"] == 1.0
        assert found["kl"] == found["nll_difference"] == 0.0
        model.apply(changed(model))
        model.revert()
    other = health(model, neutral, batch_size=3)  # other batches may round otherwise
    assert other["kl"] == pytest.approx(0, abs=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("family", ["gptj", "llama"])  # a head of its own, and tied embeddings
def test_an_edited_head_is_compared_with_the_original_one(family, make_model):
    model = make_model(family)
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=5)
    before = naive(model, neutral.ids)
    head = model.model.get_output_embeddings().weight
    (name,) = (name for name, p in model.model.named_parameters() if p is head)
    model.apply(changed(model, name))
    found = health(model, neutral, batch_size=5)
    assert found == pytest.approx(expected(before, naive(model, neutral.ids), neutral.ids), 1e-9)


@dataclass(frozen=True)
class Doubled(Overlay):
    """Doubles what one module says."""

    kind = "doubled"
    path: str

    def hooks(self, passage):
        return {self.path: lambda _states, output: 2 * output}

    def tensors(self):
        return {}

    @classmethod
    def from_tensors(cls, tensors):
        raise AssertionError("never read from a file here")


def test_overlays_act_on_neutral_text_too(make_model):
    model = make_model("llama")
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=5)
    before = naive(model, neutral.ids)
    path = model.ffn[1].value.weight_name.removesuffix(".weight")
    model.apply(Edit(WeightDelta({}), {"doubled": Doubled(path)}))
    found = health(model, neutral, batch_size=5)
    model.revert()
    module = model.model.get_submodule(path)
    with module.register_forward_hook(lambda _module, _inputs, output: 2 * output):
        after = naive(model, neutral.ids)
    assert found == pytest.approx(expected(before, after, neutral.ids), 1e-9)
    assert found["kl"] > 0.001


def test_a_model_that_is_broken_beyond_floats_is_infinitely_bad(make_model):
    model = make_model("gptj")
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=5)
    head = model.model.get_output_embeddings().weight
    (name,) = (name for name, p in model.model.named_parameters() if p is head)
    model.apply(changed(model, name, size=1e4))
    found = health(model, neutral, batch_size=5)
    assert found["perplexity"] == found["perplexity_ratio"] == math.inf
    assert math.isfinite(found["nll_difference"])


def test_a_file_gives_the_text_back_bit_by_bit(make_model, tmp_path):
    model = make_model("llama", torch.bfloat16)
    neutral = NeutralText.written_by(model, SETTINGS, batch_size=2)
    for name in ("a", "b"):
        neutral.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = NeutralText.open(tmp_path / "a")
    for name, tensor in vars(neutral).items():
        assert torch.equal(tensor, getattr(again, name)), name
        assert tensor.dtype == getattr(again, name).dtype
    assert again.tokens == 60
    write_tensors(tmp_path / "c", {"ids": neutral.ids}, "other", {})
    with pytest.raises(KMEBenchError, match=r"not a file of format kmebench\.neutral_text"):
        NeutralText.open(tmp_path / "c")


def test_texts_fit_the_context_and_follow_their_own_seed(make_model):
    model = make_model("gptj")
    state = torch.get_rng_state()
    long = NeutralText.written_by(model, NeutralSettings(texts=1, length=1000), batch_size=1)
    assert long.ids.shape == (1, model.context)
    one, other = (
        NeutralText.written_by(model, NeutralSettings(3, 8, seed), batch_size=3) for seed in (0, 1)
    )
    assert not torch.equal(one.ids, other.ids)
    assert torch.equal(torch.get_rng_state(), state)  # a run's own numbers are not used up
