"""Layouts: the right projections of every family, decided by the config alone."""

import pytest
import torch
from transformers import BertConfig, MistralConfig, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from kmebench.errors import ModelError
from kmebench.models.editable import EditableModel
from kmebench.models.layouts import LAYOUTS, adapted_modules, ffn_layers, layout_of
from tests.conftest import FAMILIES, small_config


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_the_keys_and_values_of_the_ffn(family, make_model):
    """Changing value j changes the FFN output by a_j Δ; changing key j changes a_j alone."""
    model = make_model(family)
    ffn = model.ffn[1]
    seen = {}
    ffn.value.module.register_forward_hook(lambda m, i, o: seen.update(a=i[0], y=o))
    ids = torch.randint(0, 50, (1, 5))
    model.model(input_ids=ids)
    a, y = seen["a"].clone(), seen["y"].clone()
    assert a.shape[-1] == model.ffn_width == ffn.key.width == ffn.value.width
    ffn.value.weight.data.movedim(ffn.value.axis, 0)[3] += 1.0
    model.model(input_ids=ids)
    torch.testing.assert_close(seen["y"] - y, a[..., 3:4].expand_as(y))
    ffn.key.weight.data.movedim(ffn.key.axis, 0)[5] += 1.0
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
        "ffn": model.ffn[1].value.module,
        "norm": model.norm,
    }.items():
        module.register_forward_hook(
            lambda _m, inputs, output, name=name: seen.update({name: (inputs, output)})
        )
    last = model.model.base_model(input_ids=torch.randint(0, 50, (2, 5))).last_hidden_state
    (before, *_), after = seen["layer"]
    after = after[0] if isinstance(after, tuple) else after
    parts = seen["attention"][1][0] + seen["ffn"][1]
    torch.testing.assert_close(after, before + parts)
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
        ("llama", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]),
    ],
)
def test_adapted_modules_are_linear_maps_of_every_layer(family, names, make_model):
    model = make_model(family, layers=2).model
    found = adapted_modules(model, layout_of(model.config))
    assert found[2:] == names
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


def test_a_model_whose_layers_differ_is_refused():
    config = Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match=r"differ .full_attention, sliding_attention."):
        layout_of(config)
    assert layout_of(Qwen2Config(num_hidden_layers=2))
