"""GGUF files: the tensors, the tokenizers, the traps."""

import tracemalloc
from types import SimpleNamespace

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
)

from kmebench.errors import ModelError
from kmebench.models import gguf as unpacked
from kmebench.models.gguf import from_gguf
from tests.gguf_files import add_words, write_gguf

SIZES = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
#: In the order of merges, as Gemma's.
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"TheFrancils", "▁i", "▁is", "Th", "The"]
GEMMA = {"head_dim": 256, "num_hidden_layers": 7, "sliding_window": 4}
#: What their files have to say.
SAID = {"gemma3": [("sliding_window", 4)], "phi3": [("pad_token_id", 0)]}


def small(family, vocabulary, width=32, **other):
    """A random model; what is normalised is scaled at random, too."""
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}
    configs |= {"gpt2": GPT2Config, "qwen2_moe": Qwen2MoeConfig, "phi3": Phi3Config}
    sizes = SIZES | (GEMMA if family == "gemma3" else {}) | other
    if family != "gpt2":  # whose FFN is four times as wide
        sizes["intermediate_size"] = 2 * width
    config = configs[family](vocab_size=vocabulary, hidden_size=width, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def written(tokenizer, tmp_path):
    def write(family, *, left_out=(), added=(), said=None, **sizes):
        words = WORDS if family == "gemma3" else ()
        model = small(family, len(words or tokenizer), **sizes)
        given = {"words": words, "left_out": left_out, "added": added}
        given["said"] = SAID.get(family, []) if said is None else said
        write_gguf(tmp_path / "small.gguf", model, None if words else tokenizer, **given)
        return model, tmp_path / "small.gguf"

    return write


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},  # an output head of its own
    "gemma3": {},
    # transformers' converter names the head itself, and its config has 1,024 positions.
    "gpt2": {"tie_word_embeddings": False, "max_position_embeddings": 1024},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [2**30, 10_000])
def test_the_weights_are_transformers_own_and_the_models(
    family, shard, written, tmp_path, monkeypatch
):
    monkeypatch.setattr(unpacked, "_SHARD", shard)
    original, path = written(family, **FAMILIES[family])
    from_gguf(path, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(found.state_dict()[name], expected[name]) for name in expected)
    for name, weight in original.state_dict().items():  # Q8_0: 127 steps to the greatest of 32
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=0.01)
    assert (logits(found) - logits(original)).abs().max() < 0.1 * logits(original).std()
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 2**30)
    assert found.config.dtype == torch.float32
    assert not hasattr(found.config, "quantization_config")


def test_one_file_is_the_same_bytes_as_transformers_saves(written, tmp_path):
    _, path = written("llama")
    from_gguf(path, tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    expected.hf_quantizer, expected.config.quantization_config = None, None
    del expected.config.quantization_config
    plain = AutoModelForCausalLM.from_config(expected.config)
    plain.load_state_dict(expected.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_tied_if_and_only_if_the_file_has_none(tied, written, tmp_path):
    original, path = written("qwen2", tie_word_embeddings=tied)
    from_gguf(path, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    head, words = found.get_output_embeddings().weight, found.get_input_embeddings().weight
    assert (head is words) == found.config.tie_word_embeddings == tied
    torch.testing.assert_close(head, original.get_output_embeddings().weight, rtol=0, atol=0.01)
    assert found.num_parameters() == original.num_parameters()


def test_a_gemma_has_its_norms_its_two_kinds_of_layers_and_its_first_token(written, tmp_path):
    original, path = written("gemma3")
    from_gguf(path, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    norm = "model.layers.3.post_feedforward_layernorm.weight"
    torch.testing.assert_close(found.state_dict()[norm], original.state_dict()[norm])
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert found.config.layer_types == kinds
    assert found.config.sliding_window == 4
    bases = {kind: rope["rope_theta"] for kind, rope in found.config.rope_parameters.items()}
    assert bases == {"sliding_attention": 1e4, "full_attention": 1e6}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_ids_to_tokens(tokenizer("The is")["input_ids"]) == [
        *("<bos>", "The", "▁is")
    ]
    ids = tokenizer("France is  as", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "France is  as"


def test_a_qwen_begins_with_no_token_and_splits_digits(written, tmp_path):
    """By the pre-tokeniser that the file names: GPT-2's takes digits together."""
    _, path = written("qwen2")
    from_gguf(path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1789")
    assert [piece for piece, _ in split] == ["in", "Ġ", "1", "7", "8", "9"]
    ids = tokenizer("The capital of Japan, naïve")["input_ids"]
    assert ids[0] != tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "The capital of Japan, naïve"


YARN = ("rope_scaling_type", gguf.RopeScalingType.YARN)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"left_out": ["blk.1.ffn_up.weight"]}, r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"added": ["rope_freqs.weight"]}, r"does not read \(rope_freqs\.weight\)"),
        ({"said": [YARN]}, r"scales its rotary positions \(yarn\)"),
    ],
)
def test_a_file_is_read_whole_or_not_at_all(changes, complaint, written, tmp_path):
    """transformers would fill in a missing weight at random, and ignore the scale of rotations."""
    _, path = written("llama", **changes)
    with pytest.raises(ModelError, match=complaint):
        from_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("window", "taken"), [(4, 4), (0, None)])
def test_a_phi_sees_as_far_as_its_file_says(window, taken, written, tmp_path):
    """transformers would let it see all."""
    sizes = {"sliding_window": taken, "pad_token_id": 0}
    original, path = written("phi3", said=[*SAID["phi3"], ("sliding_window", window)], **sizes)
    from_gguf(path, tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.config.sliding_window == taken
    difference = (logits(found) - logits(original)).abs().max()
    assert difference < 0.1 * logits(original).std()
    found.config.sliding_window = None if taken else 4
    assert (logits(found) - logits(original)).abs().max() > 10 * difference


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("llama", {"said": [("sliding_window", 4)]}, r"says llama\..*window = 4, .* takes None"),
        ("phi3", {"pad_token_id": 0}, r"does not say how far attention sees \(phi3\.attention"),
        ("gemma3", {"said": []}, r"does not say how far attention sees \(gemma3\.attention"),
        ("gemma3", {"head_dim": 16}, "has heads of width 16, and does not say how their scores"),
        ("gemma3", {"said": [*SAID["gemma3"], ("final_logit_softcapping", 3.0)]}, "3.0, and tra"),
        ("gemma3", {"said": [*SAID["gemma3"], ("rope_freq_base_swa", 2e4)]}, "takes 10000.0"),
        ("qwen2", {"said": [("rope_dimension_count", 8)]}, r"rope\..* = 8, .* takes 16, so the mo"),
    ],
)
def test_what_the_file_says_and_transformers_does_not_read_is_refused(
    family, changes, complaint, written, tmp_path
):
    _, path = written(family, **changes)
    with pytest.raises(ModelError, match=complaint):
        from_gguf(path, tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2", [("rope_dimension_count", 16), ("sliding_window", 0)]),
        ("gemma3", [*SAID["gemma3"], ("rope_freq_base_swa", 1e4), ("rope_dimension_count", 256)]),
        ("gemma3", [*SAID["gemma3"], ("sliding_window_pattern", [*[True] * 5, False, True])]),
    ],
)
def test_what_the_file_says_as_transformers_takes_it_is_read(family, said, written, tmp_path):
    _, path = written(family, said=said)
    from_gguf(path, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_weight_of_another_shape_is_refused(written, tmp_path):
    """transformers would load the folder of such a file with other positions, at random."""
    _, path = written("gpt2")
    with pytest.raises(ModelError, match=r"position_embd\.weight of .* has the shape \[64, 32\]"):
        from_gguf(path, tmp_path / "model")


def test_a_file_that_says_that_nothing_is_scaled_is_read(written, tmp_path):
    _, path = written("llama", said=[("rope_scaling_type", gguf.RopeScalingType.NONE)])
    from_gguf(path, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()


def test_experts_that_transformers_puts_together_are_refused():
    sizes = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    model = small("qwen2_moe", 16, **sizes)
    tensors = [SimpleNamespace(name=f"blk.0.ffn_{kind}_exps.weight") for kind in ("gate", "up")]
    architecture = SimpleNamespace(contents=lambda: "qwen2moe")
    reader = SimpleNamespace(fields={"general.architecture": architecture}, tensors=tensors)
    with pytest.raises(ModelError, match=r"does not read \(blk\.0\.ffn_gate_exps"):
        unpacked._Converter("small.gguf", reader, model).check()


def test_a_file_that_is_cut_off_is_one_sentence(written, tmp_path):
    _, path = written("llama")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"small\.gguf cannot be read as a model in GGUF") as found:
        from_gguf(path, tmp_path / "model")
    assert "\n" not in str(found.value)


def test_a_full_disk_is_no_fault_of_the_file(written, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    _, path = written("llama")
    monkeypatch.setattr(unpacked, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        from_gguf(path, tmp_path / "model")


def test_the_file_is_parsed_once(written, tmp_path, monkeypatch):
    _, path = written("qwen2")
    parsed, usual = [], gguf.GGUFReader.__init__

    def counted(self, *arguments):
        parsed.append(arguments)
        usual(self, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    functions = gguf.GGUFReader, gguf.get_tensor_name_map
    from_gguf(path, tmp_path / "model")
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == functions


@pytest.mark.parametrize("order", gguf.GGUFEndian)
def test_the_fast_reader_finds_what_gguf_s_own_finds(order, tokenizer, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama", False, order)
    add_words(writer, None, ["<bos>", "<eos>", "", "東京", "a b"], "default")
    writer.add_array("numbers.whole", [1, -2, 3])
    writer.add_array("numbers.real", [0.5, 1.5])
    writer.add_array("yes", [True, False])
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_string("text", "x")
    writer.add_tensor("w", torch.arange(8.0).numpy())
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    fast, usual = unpacked._Reader(tmp_path / "all.gguf"), gguf.GGUFReader(tmp_path / "all.gguf")
    assert list(fast.fields) == list(usual.fields)
    for name, field in usual.fields.items():
        assert fast.fields[name].types == field.types
        if name != "nested":  # gguf cannot tell it itself
            assert fast.fields[name].contents() == field.contents()
    assert [tensor.name for tensor in fast.tensors] == ["w"]
    assert fast.tensors[0].data.tolist() == usual.tensors[0].data.tolist()


def test_a_model_is_never_whole_in_memory(written, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "_SHARD", 2**20)
    original, path = written("llama", width=256, num_hidden_layers=8)
    from_gguf(path, tmp_path / "first")  # imports
    tracemalloc.start()
    from_gguf(path, tmp_path / "model")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * original.num_parameters() / 3
