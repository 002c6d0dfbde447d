"""Layouts: the right projections of every family, decided by the config alone."""

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from kmebench.errors import ModelError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import LAYOUTS, adapted_modules, ffn_layers, layout_of
from tests.conftest import FAMILIES, small_config


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_the_keys_and_values_of_the_ffn(family, make_model):
    """W2's output is Σ a_j v_j and its bias; changing key j changes a_j alone."""
    model = make_model(family)
    ffn = model.ffn[1]
    seen = {}
    ffn.value.module.register_forward_hook(lambda m, i, o: seen.update(a=i[0], y=o))
    ids = torch.randint(0, 50, (1, 5))
    model.model(input_ids=ids)
    a, y = seen["a"].clone(), seen["y"].clone()
    assert a.shape == (1, 5, 24)
    assert model.ffn_width == ffn.key.width == ffn.value.width == 24
    bias = 0 if ffn.value.bias_name is None else model.parameter(ffn.value.bias_name)
    values = ffn.value.weight.movedim(ffn.value.axis, 0)
    torch.testing.assert_close(y, sum(a[..., j, None] * values[j] for j in range(24)) + bias)
    assert model.parameter(ffn.key.weight_name) is ffn.key.weight
    assert model.parameter(ffn.value.weight_name) is ffn.value.weight
    ffn.key.segments(ffn.key.weight.data, ffn.key.axis).movedim(ffn.key.axis, 0)[5] += 1.0
    model.model(input_ids=ids)
    changed = (seen["a"] != a).any(dim=1).squeeze().nonzero().flatten()
    assert changed.tolist() == [5]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_adds_its_attention_and_its_ffn_to_the_residual_stream(family, make_model):
    model = make_model(family)
    seen = {}
    layer = model.layers[1]
    for name, module in {
        "layer": layer,
        "attention": model.attention[1],
        "ffn": model.ffn[1].output,
        "norm": model.norm,
    }.items():
        module.register_forward_hook(
            lambda _m, inputs, output, name=name: seen.update({name: (inputs, output)})
        )
    last = model.model.base_model(input_ids=torch.randint(0, 50, (2, 5))).last_hidden_state
    (before, *_), after = seen["layer"]
    after = after[0] if isinstance(after, tuple) else after
    attended = seen["attention"][1][0]
    if "gemma" in family:
        attended = layer.post_attention_layernorm(attended)
    torch.testing.assert_close(after, before + attended + seen["ffn"][1])
    assert (model.ffn[1].norm is not None) == ("gemma" in family)
    torch.testing.assert_close(last, seen["norm"][1], rtol=0, atol=0)
    assert len(model.layers) == len(model.attention) == model.n_layers


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen2Config])
def test_llama_like_families_share_a_layout(config_class):
    config = config_class(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert [f.key.weight_name for f in ffn_layers(model, layout_of(config))] == [
        f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)
    ]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gptj", ["transformer.h.1.mlp.fc_in", "transformer.h.1.mlp.fc_out"]),
        ("gpt2", ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
        ("gpt_neox", ["gpt_neox.layers.1.attention.query_key_value"]),
        ("phi3", ["model.layers.1.self_attn.qkv_proj"]),
        ("opt", [f"model.decoder.layers.1.self_attn.{x}_proj" for x in "qv"]),
        *(
            (family, [f"model.layers.1.self_attn.{x}_proj" for x in "qv"])
            for family in ("llama", "qwen3", "gemma2", "gemma3_text")
        ),
    ],
)
def test_adapted_modules_are_linear_maps_of_every_layer(family, names, make_model):
    model = make_model(family, layers=2).model
    found = adapted_modules(model, layout_of(model.config))
    assert found[len(names) :] == names
    assert all(model.get_submodule(name).weight.ndim == 2 for name in found)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"No layout for model type 'bert' .known: gptj, gpt2"):
        layout_of(BertConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_the_same_whatever_its_folder_is_called(
    family, make_model, requests, tmp_path
):
    model = make_model(family, torch.float32)
    folder = tmp_path / "llama-gpt-renamed"
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    loaded = EditableModel.load(folder, device="cpu")
    pairs = [(r.filled_prompt, r.target_new) for r in requests]
    assert loaded.encode(pairs) == model.encode(pairs)
    batch = model.collate(model.encode(pairs))
    torch.testing.assert_close(loaded.answer_logits(batch), model.answer_logits(batch))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nothing holds no Hugging Face model"):
        EditableModel.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (1, r"lack \d+ tensors of the model .* as transformer\.h\.3\."),
        (
            -1,
            r"hold more layers than its config.json .*1 more, such as that of transformer\.h\.2\.",
        ),
    ],
)
def test_weights_that_are_not_the_layers_of_the_config_are_refused(
    more, said, make_model, tmp_path
):
    model = make_model("gptj", torch.float32)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    model.model.config.n_layer += more
    model.model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        EditableModel.load(tmp_path)


def test_pickled_weights_are_never_loaded(make_model, tmp_path):
    model = make_model("llama", torch.float32)
    model.model.config.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="No model could be loaded"):
        EditableModel.load(tmp_path)


def test_every_layout_is_of_a_family_that_transformers_knows():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(LAYOUTS) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {small_config(f, 50).model_type for f in FAMILIES} <= set(LAYOUTS)


def test_adapted_modules_of_new_families_are_those_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    ours = {"gptj", "gpt2"}  # the FFN's
    for family in set(LAYOUTS) - ours - {"phi3"}:  # which peft does not know
        assert [name.rpartition(".")[2] for name in LAYOUTS[family].adapted] == PEFT[family]


def test_opts_layers_compute_what_those_of_transformers_do(make_model):
    model = make_model("opt")
    again = AutoModelForCausalLM.from_config(model.model.config).double().eval()
    again.load_state_dict(model.model.state_dict())
    ids = torch.randint(0, 50, (3, 9))
    torch.testing.assert_close(model.model(ids).logits, again(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ours, theirs = (m(ids, attention_mask=mask).logits for m in (model.model, again))
    torch.testing.assert_close(ours[0, 4:], theirs[0, 4:])
    torch.testing.assert_close(ours[1:], theirs[1:])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Gemma3Config(), r"'gemma3' reads more than text; .* 'gemma3_text'"),
        (Qwen3MoeConfig(num_hidden_layers=2), r"'qwen3_moe' is a mixture of experts.*dense model"),
        (OPTConfig(do_layer_norm_before=False), r"^This opt model .*opt-350m; choose another size"),
        (OPTConfig(word_embed_proj_dim=512), r"opt-350m; choose another size"),
        (
            Gemma3TextConfig(use_bidirectional_attention=True),
            r"gemma3_text .* reads what follows a token; choose a causal",
        ),
        (
            Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]),
            r"qwen2 .* layers of the kind 'linear_attention'; choose",
        ),
    ],
)
def test_what_no_layout_tells_is_refused_in_a_sentence(config, sentence):
    with pytest.raises(ModelError, match=sentence) as caught:
        layout_of(config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def test_a_text_ends_where_longrope_would_move_all_its_positions(make_model):
    """The trap: one token more changes the logits of all before it."""
    model = make_model("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=12)
    ids = torch.tensor([list(range(4, 17))])
    with torch.no_grad():
        shorter, within, beyond = (model.model(ids[:, :n]).logits[0, :11] for n in (11, 12, 13))
    torch.testing.assert_close(shorter, within, rtol=1e-9, atol=1e-9)
    assert (within - beyond).abs().max() > 1e-3
    assert model.context == 12
    words = [" Paris" * n for n in range(1, 20)]
    tokens = [len(ids) for ids in model.tokenizer(words)["input_ids"]]
    for text, n in zip(words, tokens, strict=True):
        if n <= 12:
            model.encode_prompts([text])
        else:
            with pytest.raises(ModelError, match=r"than the 12 of .* which LongRoPE moves all pos"):
                model.encode_prompts([text])
    assert min(tokens) <= 12 < max(tokens)
