"""Where a model family keeps its layers, its attention and its feed-forward network (FFN).

A layout names, inside one decoder layer, the attention module, the key projection W1 (its j-th
segment is the key k_j, [D]) and the value projection W2 (its j-th segment is the value v_j,
[D]); D is the hidden size, M the FFN width. A new family is one new entry of :data:`LAYOUTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from kmebench.errors import ModelError
from kmebench.models import opt


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one model family, as dotted module paths."""

    layers: str
    norm: str  # between the last layer and the head
    attention: str  # this and all below: inside a layer
    key_projection: str
    value_projection: str
    adapted: tuple[str, ...]  # the linear maps that get a LoRA adapter
    gate_first: bool = False  # W1's module holds the gate above the keys
    gate_projection: str | None = None  # the gate, where it has a module of its own
    value_norm: str | None = None  # between W2 and the residual stream
    windowed: bool = False  # whether ``config.sliding_window`` bounds what attention sees
    prepare: Callable[[Sequence[nn.Module]], None] | None = None  # given the layers, once


def _llama(
    *,
    key_projection: str = "mlp.up_proj",
    adapted: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj"),
    gate_first: bool = False,
    value_norm: str | None = None,
    windowed: bool = True,
) -> Layout:
    """Return the layout of Llama, or of one that differs from it in little."""
    return Layout(
        "model.layers",
        "model.norm",
        "self_attn",
        key_projection,
        "mlp.down_proj",
        adapted,
        gate_first,
        None if gate_first else "mlp.gate_proj",
        value_norm,
        windowed,
    )


_GEMMA = _llama(value_norm="post_feedforward_layernorm")

#: ``config.model_type`` -> layout. Gated families keep the gate untouched: the FFN activation is
#: act(gate) * up, so up_proj holds the keys and down_proj the values.
LAYOUTS: dict[str, Layout] = {
    "gptj": Layout(
        "transformer.h",
        "transformer.ln_f",
        "attn",
        "mlp.fc_in",
        "mlp.fc_out",
        ("mlp.fc_in", "mlp.fc_out"),
    ),
    # Attention is one fused map here, so the FFN is adapted, as in GPT-J.
    "gpt2": Layout(
        "transformer.h",
        "transformer.ln_f",
        "attn",
        "mlp.c_fc",
        "mlp.c_proj",
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Layout(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "attention",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        ("attention.query_key_value",),
    ),
    "opt": Layout(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "self_attn",
        "fc1",
        "fc2",
        ("self_attn.q_proj", "self_attn.v_proj"),
        prepare=opt.keep_texts_apart,
    ),
    "llama": _llama(windowed=False),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "phi3": _llama(
        key_projection="mlp.gate_up_proj", adapted=("self_attn.qkv_proj",), gate_first=True
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}

#: What attention of a layer may see; ``config.layer_types`` names the kind of every layer.
KINDS = {"full_attention", "sliding_attention"}


def layout_of(config: PretrainedConfig) -> Layout:
    """Return the layout of a loaded configuration.

    Raises:
        ModelError: the family has no layout, or its layout does not hold for this model.
    """
    if config.model_type not in LAYOUTS:
        raise ModelError(_unknown(config))
    reason = _unsupported(config)
    if reason is not None:
        raise ModelError(f"This {config.model_type} model cannot be edited: {reason}.")
    return LAYOUTS[config.model_type]


def _unknown(config: PretrainedConfig) -> str:
    """Say why a family has no layout, and what to do."""
    kind = f"model type {config.model_type!r}"
    if hasattr(config, "text_config"):
        return (
            f"The {kind} reads more than text; save its text model alone "
            f"(model type {config.text_config.model_type!r}) and name that folder."
        )
    if any(hasattr(config, name) for name in ("num_experts", "num_local_experts")):
        return (
            f"The {kind} is a mixture of experts, whose layers have several FFNs; choose a dense "
            f"model ({', '.join(LAYOUTS)})."
        )
    return (
        f"No layout for {kind} (known: {', '.join(LAYOUTS)}); add one to "
        "kmebench/models/layouts.py."
    )


def _unsupported(config: PretrainedConfig) -> str | None:
    """Say what a model of a known family has that its layout does not tell."""
    if getattr(config, "quantization_config", None):  # its weights are codes, or copies of codes
        return "its weights are quantised; take the model that it was made from"
    if config.model_type == "opt" and (
        not config.do_layer_norm_before
        or config._remove_final_layer_norm
        or config.word_embed_proj_dim != config.hidden_size
    ):
        return (
            "its norms stand behind the residual stream, or its embeddings have a width of their "
            "own, as in opt-350m; choose another size of OPT"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention reads what follows a token; choose a causal language model"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - KINDS)
    if kinds:
        return f"it has layers of the kind {kinds[0]!r}; choose a model with attention in all"
    return None


def windows_of(config: PretrainedConfig, attention: Sequence[nn.Module]) -> list[int | None]:
    """Return how many positions each layer's attention sees, its own included; None: all before.

    Families of mixed layers write it at each attention; in others it holds for all.
    """
    every = config.sliding_window if LAYOUTS[config.model_type].windowed else None
    return [getattr(module, "sliding_window", every) for module in attention]


def context_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read; None if its positions have no end.

    LongRoPE (Phi-3 and 4) turns all positions of a text by other angles once it is longer than
    ``original_max_position_embeddings``. Nothing that was computed before would hold then, so a
    text ends there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return getattr(config, "max_position_embeddings", None)


def adapted_modules(model: nn.Module, layout: Layout) -> list[str]:
    """Return the names of the modules that LoRA adapts, first layer first."""
    n_layers = len(model.get_submodule(layout.layers))
    return [f"{layout.layers}.{i}.{name}" for i in range(n_layers) for name in layout.adapted]


def layer_parameters(model: nn.Module, layout: Layout, layer: int) -> dict[str, nn.Parameter]:
    """Return all parameters of a layer, attention and norms among them, by their names."""
    path = f"{layout.layers}.{layer}"
    return dict(model.get_submodule(path).named_parameters(prefix=path))


@dataclass(frozen=True)
class Projection:
    """One FFN projection of one layer.

    ``axis`` is the axis of ``weight`` that counts FFN segments: nn.Linear stores [out, in], the
    Conv1D of GPT-2 [in, out]. The M segments begin at ``offset``: what stands before them is the
    gate of a family that keeps both in one module.
    """

    module: nn.Module
    weight_name: str
    bias_name: str | None
    axis: int
    offset: int = 0

    @property
    def weight(self) -> nn.Parameter:
        """The weight: [offset + M, D] or [D, M] according to ``axis``."""
        return self.module.weight

    @property
    def width(self) -> int:
        """Number of segments M."""
        return self.weight.shape[self.axis] - self.offset

    def segments(self, values: Tensor, axis: int) -> Tensor:
        """Return the part of the segments, as a view, of what also counts the gate on ``axis``."""
        return values.narrow(axis, self.offset, self.width)


@dataclass(frozen=True)
class FFN:
    """The two projections of one layer, and the gate where it has a module of its own.

    ``output`` is the module whose output joins the residual stream: W2's, or the norm behind it.
    """

    key: Projection
    value: Projection
    output: nn.Module
    gate: Projection | None

    @property
    def norm(self) -> nn.Module | None:
        """The norm between W2 and the residual stream, where the family has one."""
        return None if self.output is self.value.module else self.output


def ffn_layers(model: nn.Module, layout: Layout) -> list[FFN]:
    """Return the FFN of every layer of ``model``, first layer first."""
    layers = model.get_submodule(layout.layers)
    found = []
    for index, layer in enumerate(layers):
        prefix = f"{layout.layers}.{index}"
        key_name, value_name = f"{prefix}.{layout.key_projection}", layout.value_projection
        key = _projection(model, key_name, is_key=True, gate_first=layout.gate_first)
        value = _projection(model, f"{prefix}.{value_name}", is_key=False)
        gate_name = layout.gate_projection
        gate = _projection(model, f"{prefix}.{gate_name}", is_key=True) if gate_name else None
        output = layer.get_submodule(layout.value_norm or value_name)
        found.append(FFN(key, value, output, gate))
    return found


def _projection(
    model: nn.Module, name: str, *, is_key: bool, gate_first: bool = False
) -> Projection:
    module = model.get_submodule(name)
    output_axis = 1 if isinstance(module, Conv1D) else 0
    # Segments are counted by the output of W1 and by the input of W2.
    axis = output_axis if is_key else 1 - output_axis
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    offset = module.weight.shape[axis] // 2 if gate_first else 0
    return Projection(module, f"{name}.weight", bias, axis, offset)
