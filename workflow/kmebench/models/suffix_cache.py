"""Running the upper layers again and again from the last token of a subject on.

What is changed at the subject's last token t(s) of a layer's input reaches neither the layers
below nor, attention being causal, any position before t(s) above. So the layers below run once,
the attention keys and values of the positions before t(s) are kept, and a replay computes the
positions from t(s) on alone. Nothing is approximated.

Row r has t(s) = ``offsets[r]``. Its kept positions are padded on the right to P and masked, its
replayed ones are padded on the right to S; column 0 is t(s) in every row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kmebench.models.early_exit import Call, input_of, layer_calls
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, EncodedSubject
from kmebench.models.prefixes import KeysAndValues


class _Kept(DynamicCache):
    """Keys and values that stand before all new ones and never grow."""

    def __init__(self, kept: Mapping[int, KeysAndValues]) -> None:
        super().__init__()
        self.kept = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysAndValues:
        keys, values = self.kept[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


@dataclass(frozen=True)
class Replay:
    """R texts, ready to be replayed from the input of layer ``start``."""

    model: EditableModel
    start: int
    states: Tensor  # [R, S, D], the input of layer ``start`` from t(s) on
    kept: Mapping[int, KeysAndValues]  # layer -> what its attention sees of the positions before
    offsets: Tensor  # [R]
    lengths: Tensor  # [R], replayed positions that are no padding

    @classmethod
    @torch.no_grad()
    def of(cls, model: EditableModel, encoded: Sequence[EncodedSubject], start: int) -> "Replay":
        """Run the layers below ``start``, and those above before t(s), on the live weights.

        The last token of a target is only ever predicted, so it is not fed.
        """
        fed = [Encoded(e.ids[: len(e.ids) - bool(e.n_target)], 0) for e in encoded]
        batch = model.collate(fed)
        module = [*model.layers, model.norm][start]
        below = input_of(model, module, input_ids=batch.input_ids)  # [R, T, D]
        offsets = torch.tensor([e.subject_last for e in encoded], device=below.device)
        lengths = torch.tensor([len(e.ids) for e in fed], device=below.device) - offsets
        columns = offsets[:, None] + torch.arange(int(lengths.max()), device=below.device)
        columns = columns.clamp(max=below.shape[1] - 1)
        states = below[torch.arange(len(fed), device=below.device)[:, None], columns]
        kept = _keys_and_values(model, below[:, : _width(offsets)], start)
        return cls(model, start, states, kept, offsets, lengths)

    def select(self, rows: Tensor) -> "Replay":
        """Return a replay of some rows, with no more padding than these need."""
        offsets, lengths = self.offsets[rows], self.lengths[rows]
        width = _width(offsets)
        return replace(
            self,
            states=self.states[rows, : int(lengths.max())],
            kept={
                layer: tuple(x[rows.to(x.device), :, :width] for x in pair)
                for layer, pair in self.kept.items()
            },
            offsets=offsets,
            lengths=lengths,
        )

    def run(self, states: Tensor) -> Tensor:
        """Return the normed final states [R, S, D] that follow from ``states`` [R, S, D]."""
        for call in self._calls:
            states = call.run(states)
        return self.model.norm(states)

    @cached_property
    def _calls(self) -> list[Call]:
        """What every replayed layer is handed besides its states."""
        masks = {window: self._mask(window) for window in set(self.model.windows)}
        calls = layer_calls(
            self.model,
            inputs_embeds=self.states,  # its shape alone counts
            attention_mask=masks[self.model.windows[0]],
            position_ids=self._positions,
            past_key_values=_Kept(self.kept),
        )
        for call, window in zip(calls, self.model.windows, strict=True):
            if len(masks) > 1:
                call.kwargs["attention_mask"] = masks[window]
        return calls[self.start :]

    @cached_property
    def _positions(self) -> Tensor:
        """Positions of the replayed tokens in their texts, [R, S]; padding repeats the last."""
        steps = torch.arange(self.states.shape[1], device=self.states.device)
        return self.offsets[:, None] + steps.minimum(self.lengths[:, None] - 1)

    def _mask(self, window: int | None) -> Tensor:
        """What is added to the attention scores, [R, 1, S, P + S]: causal, no padding before.

        With a window a token sees so many positions, its own included.
        """
        n_rows, size, _ = self.states.shape
        before = torch.arange(_width(self.offsets), device=self.offsets.device)
        seen = (before < self.offsets[:, None])[:, None].expand(-1, size, -1)
        causal = torch.ones(size, size, dtype=torch.bool, device=seen.device).tril()
        seen = torch.cat([seen, causal.expand(n_rows, -1, -1)], dim=2)
        if window is not None:
            places = torch.cat([before.expand(n_rows, -1), self._positions], dim=1)  # [R, P + S]
            seen = seen & (places[:, None] > self._positions[..., None] - window)
        hidden = torch.finfo(self.states.dtype).min
        return torch.zeros_like(seen, dtype=self.states.dtype).masked_fill(~seen, hidden)[:, None]


def _width(offsets: Tensor) -> int:
    """Columns P to keep; one at least, since not all kernels take none."""
    return max(1, int(offsets.max()))


def _keys_and_values(model: EditableModel, states: Tensor, start: int) -> dict[int, KeysAndValues]:
    """Run the layers from ``start`` on and keep what their attention computes."""
    # No configuration: a layer with a sliding window would drop positions.
    cache = DynamicCache()
    for call in layer_calls(model, inputs_embeds=states, past_key_values=cache)[start:]:
        states = call.run(states)
    return {i: (cache.layers[i].keys, cache.layers[i].values) for i in range(start, model.n_layers)}
