"""Small GGUF files, named as llama.cpp names what it converts."""

import json

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

_COMMON = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_LAYER = {
    "llama": _COMMON | {"post_attention_layernorm": "ffn_norm"},
    "qwen2": _COMMON | {"post_attention_layernorm": "ffn_norm"},
    "gpt2": {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
    },
    "phi3": {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    "gemma3": _COMMON
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    },
}
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def write_gguf(path, model, tokenizer=None, *, words=(), left_out=(), added=(), said=(), **options):
    """Write a Llama, Qwen2, Phi-3, Gemma 3 or GPT-2 of transformers.

    The vocabulary is a byte-level ``tokenizer``'s or, in the way of sentencepiece, ``words``.
    Matrices are quantised to Q8_0 where their rows can be. ``said``: keys that no size needs, as
    methods of the writer and what they are given. ``options``: of the writer.
    """
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_rope_freq_base(1e6)
    for key, value in said:
        getattr(writer, f"add_{key}")(value)
    add_words(writer, tokenizer, words, "qwen2" if architecture == "qwen2" else "default")
    for name, weight in _weights(model, architecture):
        if name not in left_out:
            _add(writer, name, weight)
    for name in added:
        _add(writer, name, np.ones(8, np.float32))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    return path


def add_words(writer, tokenizer, words, pre):
    """Write a vocabulary."""
    writer.add_tokenizer_model("gpt2" if tokenizer else "llama")
    writer.add_tokenizer_pre(pre)
    if tokenizer:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        bos, eos = 0, 0
    else:
        writer.add_token_scores([-float(index) for index in range(len(words))])
        bos, eos = words.index("<bos>"), words.index("<eos>")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(not tokenizer)


def _weights(model, architecture):
    """Yield llama.cpp's names and values."""
    for name, weight in model.named_parameters():
        module, _, kind = name.rpartition(".")
        values = weight.detach().numpy()
        if module in _TOP:
            place = _TOP[module]
        else:
            _, _, layer, part = module.split(".", 3)
            place = f"blk.{layer}.{_LAYER[architecture][part]}"
            if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                values = _interleaved(values, model.config, part)
        if architecture == "gemma3" and "norm" in module:
            values = values + 1
        if architecture == "gpt2" and ".c_" in module:  # Conv1D: [in, out]
            values = values.T
        yield f"{place}.{kind}", values


def _interleaved(values, config, part):
    """Order rotary pairs as llama.cpp does for Llama."""
    query = part.endswith("q_proj")
    heads = config.num_attention_heads if query else config.num_key_value_heads
    shaped = values.reshape(heads, 2, -1, values.shape[1])
    return shaped.swapaxes(1, 2).reshape(values.shape)


def _add(writer, name, values):
    if values.ndim > 1 and values.shape[1] % 32 == 0:
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(values))
