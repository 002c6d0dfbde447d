"""What several texts begin with, read once: attention is causal, so nothing behind it matters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

#: What the attention of a layer keeps of P positions of R rows, [R, heads, P, head size] both.
KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """P token ids, and what the attention of every layer keeps of them."""

    ids: tuple[int, ...]
    layers: tuple[KeysAndValues, ...]  # of one row

    def cache(self) -> "Behind":
        """Return a cache for rows that stand behind the prefix."""
        return Behind(self)


def keys_and_values(cache: DynamicCache) -> tuple[KeysAndValues, ...]:
    """Return what a cache holds, layer by layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


class Behind(DynamicCache):
    """Keys and values of R rows behind one prefix, which is kept once and not R times."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.prefix = prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add what is new; return the prefix's and all of the rows' own, [R, heads, P + T, .]."""
        own_keys, own_values = super().update(key_states, value_states, layer_idx)
        keys, values = self.prefix.layers[layer_idx]
        return _joined(keys, own_keys), _joined(values, own_values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens a row has so far."""
        return len(self.prefix.ids) + super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many tokens new ones may see, themselves included, and the first of them."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return len(self.prefix.ids) + length, offset


def _joined(shared: Tensor, own: Tensor) -> Tensor:
    return torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)
