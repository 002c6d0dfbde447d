"""OPT: its layers, with the texts of a batch kept apart.

transformers lays the tokens of all texts in one row, [R·T, D], before OPT's FFN. Whoever looks at
the FFN would not know which text a token is of. Here the FFN sees [R, T, D], as in other families;
the arithmetic is the same.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn


def keep_texts_apart(layers: Sequence[nn.Module]) -> None:
    """Give layers a forward pass that keeps the shape [R, T, D] throughout."""
    for layer in layers:
        # Where accelerate has put its own forward around it, the original is kept under this name.
        name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
        setattr(layer, name, MethodType(_forward, layer))


def _forward(
    layer: Any, hidden_states: Tensor, use_cache: bool | None = None, **given: Any
) -> Tensor:
    """Run one layer with its norms before attention and FFN, and without dropout."""
    normed = layer.self_attn_layer_norm(hidden_states)
    hidden_states = hidden_states + layer.self_attn(hidden_states=normed, **given)[0]
    inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_states)))
    return hidden_states + layer.fc2(inner)
