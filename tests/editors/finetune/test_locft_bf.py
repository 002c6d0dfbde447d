"""LocFT-BF: against Adam written out, what it trains, the end of text, and its mini-batches."""

import copy

import pytest
import torch

from kmebench.editors.base import build_editor
from kmebench.errors import ConfigError
from kmebench.models.layouts import layout_of
from tests.conftest import FAMILIES, in_turn
from tests.editors.finetune.literal import fine_tuned, on_the_target

HPARAMS = {"layer": 1, "learning_rate": 0.01, "steps": 4, "tolerance": 0.0, "mini_batch": 2}


def locft(**hparams):
    return build_editor("locft-bf", HPARAMS | hparams, {})


def names_of(model, parameters):
    ffn = model.ffn[1]
    if parameters == "layer":
        path = f"{layout_of(model.model.config).layers}.1."
        return [name for name, _ in model.model.named_parameters() if name.startswith(path)]
    return [(ffn.value if parameters == "value" else ffn.key).weight_name]


def ended_texts(model, requests):
    """Prompt and target as token ids, the target with the end of text."""
    encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
    end = model.tokenizer.eos_token_id
    return [(e.ids[: -e.n_target], (*e.target_ids, end)) for e in encoded]


def written_out(model, requests, parameters, **values):
    names = names_of(model, parameters)
    gated = model.model.config.model_type == "phi3" and parameters == "key"
    torch.manual_seed(1)
    return fine_tuned(
        model,
        names,
        ended_texts(model, requests),
        on_the_target,
        lambda: [group.tolist() for group in torch.randperm(len(requests)).split(2)],
        epochs=4,
        rate=0.01,
        gates=names if gated else (),
        **values,
    )


def edited(model, editor, requests):
    """The trained weights, after which the model is what it was."""
    torch.manual_seed(1)
    model.apply(editor.edit(model, requests))
    after = {name: model.parameter(name).detach().clone() for name in model.edits.touched}
    model.revert()
    return after


@pytest.mark.parametrize("parameters", ["value", "key", "layer"])
@pytest.mark.parametrize(("family", "micro_batch"), in_turn([1, 50]))
def test_locft_bf_equals_adam_written_out(parameters, family, micro_batch, make_model, requests):
    model = make_model(family)
    expected, steps = written_out(model, requests, parameters)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    editor = locft(parameters=parameters, micro_batch=micro_batch)
    found = edited(model, editor, requests)
    assert editor.steps == steps == 8
    assert list(found) == list(expected)
    assert all(torch.equal(before[n], p) for n, p in model.model.named_parameters())
    for name, weight in found.items():
        assert not torch.equal(weight, before[name]), name
        # Biases of attention's keys have no gradient: Adam makes steps of its rounding.
        if not name.endswith(("k_proj.bias", "query_key_value.bias", "c_attn.bias")):
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


def test_what_is_learnt_in_the_mean_is_left_out_of_a_pass(make_model, requests):
    """Neither weights nor moments change in such a mini-batch: later steps would differ."""
    model = make_model("llama")
    editor = locft(mini_batch=1, tolerance=0.0)
    with torch.no_grad():
        losses = sorted(editor.losses(model, editor.encode(model, requests)).tolist())
    tolerance = (losses[0] + losses[1]) / 2
    torch.manual_seed(1)
    texts = ended_texts(model, requests)
    name = model.ffn[1].value.weight_name
    expected, steps = fine_tuned(
        model,
        [name],
        texts,
        on_the_target,
        lambda: [group.tolist() for group in torch.randperm(3).split(1)],
        epochs=3,
        rate=0.01,
        tolerance=tolerance,
    )
    assert 0 < steps < 9
    editor = locft(mini_batch=1, tolerance=tolerance, steps=3)
    found = edited(model, editor, requests)
    assert editor.steps == steps
    torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_ends_in_the_end_of_text(family, make_model, requests):
    model = make_model(family)
    plain, ended = (locft(append_eos=on).encode(model, requests) for on in (False, True))
    assert plain == model.encode([(r.filled_prompt, r.target_new) for r in requests])
    for one, other in zip(plain, ended, strict=True):
        assert other.ids == (*one.ids, model.tokenizer.eos_token_id)
        assert other.n_target == one.n_target + 1
    batch = model.collate(ended)
    last = batch.counts.cumsum(0) - 1
    assert set(batch.labels[last].tolist()) == {model.tokenizer.eos_token_id}


def test_the_edited_model_ends_its_answers(trained, capital_requests):
    few = capital_requests[:3]
    texts = ended_texts(trained, few)
    trained.apply(locft(learning_rate=2e-3, steps=25, mini_batch=3).edit(trained, few))
    said = trained.generate([prompt for prompt, _ in texts], 4).tolist()
    trained.revert()
    for (_, target), row in zip(texts, said, strict=True):
        assert tuple(row[: len(target)]) == target


def test_a_tokenizer_without_an_end_of_text_is_told(make_model, requests):
    model = make_model("llama")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token; set append_eos: false"):
        locft().edit(model, requests)
    locft(append_eos=False, steps=1).edit(model, requests)


def test_the_seed_decides_the_mini_batches(make_model, requests):
    model = make_model("llama", torch.float32)

    def change(seed):
        torch.manual_seed(seed)
        (part,) = locft().edit(model, requests).values()
        return part.values

    assert torch.equal(change(0), change(0))
    assert any(not torch.equal(change(0), change(seed)) for seed in range(1, 5))


def test_a_layer_that_does_not_exist_is_refused(make_model, requests):
    with pytest.raises(ConfigError, match=r"locft-bf: layers \[22\] are not all among .* 0 to 2"):
        build_editor("locft-bf", {}, {}).edit(make_model("gptj"), requests[:1])
