"""Where a model family keeps its layers, its attention and its feed-forward network (FFN).

A layout names, inside one decoder layer, the attention module, the key projection W1 (its j-th
segment is the key k_j, [D]) and the value projection W2 (its j-th segment is the value v_j,
[D]); D is the hidden size, M the FFN width. A new family is one new entry of :data:`LAYOUTS`.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from kmebench.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one model family, as dotted module paths."""

    layers: str
    norm: str  # between the last layer and the head
    attention: str  # this and all below: inside a layer
    key_projection: str
    value_projection: str
    adapted: tuple[str, ...]  # the linear maps that get a LoRA adapter


_LLAMA = Layout(
    "model.layers",
    "model.norm",
    "self_attn",
    "mlp.up_proj",
    "mlp.down_proj",
    ("self_attn.q_proj", "self_attn.v_proj"),
)

#: ``config.model_type`` -> layout. Gated families keep ``gate_proj`` untouched: the FFN
#: activation is silu(gate) * up, so up_proj holds the keys and down_proj the values.
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
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def layout_of(config: PretrainedConfig) -> Layout:
    """Return the layout of a loaded configuration.

    Raises:
        ModelError: the family has no layout, or the layers are of different kinds.
    """
    if config.model_type not in LAYOUTS:
        raise ModelError(
            f"No layout for model type {config.model_type!r} (known: {', '.join(LAYOUTS)}); "
            "add one to kmebench/models/layouts.py."
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise ModelError(
            f"The layers of this model differ ({', '.join(kinds)}), and every layer would be run "
            "as the first one is, which is wrong for some; choose a model whose layers are alike."
        )
    return LAYOUTS[config.model_type]


def adapted_modules(model: nn.Module, layout: Layout) -> list[str]:
    """Return the names of the modules that LoRA adapts, first layer first."""
    n_layers = len(model.get_submodule(layout.layers))
    return [f"{layout.layers}.{i}.{name}" for i in range(n_layers) for name in layout.adapted]


@dataclass(frozen=True)
class Projection:
    """One FFN projection of one layer.

    ``axis`` is the axis of ``weight`` that counts FFN segments (size M): nn.Linear stores
    [out, in], the Conv1D of GPT-2 [in, out].
    """

    module: nn.Module
    weight_name: str
    bias_name: str | None
    axis: int

    @property
    def weight(self) -> nn.Parameter:
        """The weight: [M, D] or [D, M] according to ``axis``."""
        return self.module.weight

    @property
    def width(self) -> int:
        """Number of segments M."""
        return self.weight.shape[self.axis]


@dataclass(frozen=True)
class FFN:
    """The two projections of one layer."""

    key: Projection
    value: Projection


def ffn_layers(model: nn.Module, layout: Layout) -> list[FFN]:
    """Return the FFN of every layer of ``model``, first layer first."""
    layers = model.get_submodule(layout.layers)
    found = []
    for index in range(len(layers)):
        prefix = f"{layout.layers}.{index}"
        key = _projection(model, f"{prefix}.{layout.key_projection}", is_key=True)
        value = _projection(model, f"{prefix}.{layout.value_projection}", is_key=False)
        found.append(FFN(key, value))
    return found


def _projection(model: nn.Module, name: str, *, is_key: bool) -> Projection:
    module = model.get_submodule(name)
    output_axis = 1 if isinstance(module, Conv1D) else 0
    # Segments are counted by the output of W1 and by the input of W2.
    axis = output_axis if is_key else 1 - output_axis
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    return Projection(module, f"{name}.weight", bias, axis)
