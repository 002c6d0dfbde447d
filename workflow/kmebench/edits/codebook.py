"""Codebooks: keys, radii and values beside one linear layer (GRACE, Hartvigsen et al. 2023).

The layer's input at a prompt's last token is the query. If it lies in the ball of its nearest
key, the layer's output is replaced by that key's value; else nothing happens, bit by bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from kmebench.edits.overlays import Hook, Overlay, Passage, check_beside
from kmebench.io.tensors import json_tensor, json_value
from kmebench.precision import at_least_float32

if TYPE_CHECKING:
    from kmebench.models.editable import EditableModel

#: Where the output is replaced: at the prompt's last token, up to it, or everywhere.
Replacement = Literal["last", "prompt", "all"]


@dataclass(frozen=True)
class Codebook(Overlay):
    """n entries beside the linear layer at the path ``module``."""

    module: str
    replacement: Replacement
    keys: Tensor  # [n, in]
    values: Tensor  # [n, out]
    radii: Tensor  # [n]
    labels: tuple[tuple[int, ...], ...]  # n answers, as token ids

    kind: ClassVar[str] = "codebook"
    gated: ClassVar[bool] = True

    @property
    def entries(self) -> int:
        """Number n of entries."""
        return len(self.labels)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances [R] of queries [R, in] to their nearest keys, and these keys [R]."""
        queries = at_least_float32(queries)
        # Not by matrix products: a query must be at distance 0 from its own key.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries, self.keys.to(queries), compute_mode=exact)
        nearest = distances.min(dim=1)
        return nearest.values, nearest.indices

    def hooks(self, passage: Passage) -> Mapping[str, Hook]:
        """Replace the layer's output where the gate is open."""
        return {self.module: lambda inputs, output: self._replaced(passage, inputs, output)}

    def _replaced(self, passage: Passage, inputs: Tensor, output: Tensor) -> Tensor:
        if not self.entries or (passage.phase == "decode" and self.replacement != "all"):
            return output
        opened, entry = passage.decided(self, lambda: self._decision(passage, inputs))
        rows = opened.nonzero().flatten()
        if not len(rows):
            return output
        values = self.values.to(output)[entry[rows]]  # [O, out]
        replaced = output.clone()
        if self.replacement == "last":
            replaced[rows, passage.prompt_last.to(rows)[rows]] = values
            return replaced
        columns = torch.arange(output.shape[1], device=output.device)
        chosen = columns <= passage.prompt_last.to(rows)[rows][:, None]  # [O, T]
        if self.replacement == "all":
            chosen = torch.ones_like(chosen)
        replaced[rows] = torch.where(chosen[..., None], values[:, None], output[rows])
        return replaced

    def _decision(self, passage: Passage, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows' gates are open and their entries, [R] both."""
        rows = torch.arange(len(inputs), device=inputs.device)
        queries = inputs[rows, passage.prompt_last.to(rows)].detach()
        distance, entry = self.nearest(queries)
        opened = distance <= self.radii.to(distance)[entry]
        passage.note_opened(opened)
        return opened, entry

    def check(self, model: "EditableModel") -> None:
        """Refuse a model without this layer, or with one of another width."""
        widths = (self.keys.shape[1], self.values.shape[1])
        check_beside(model, self.module, widths, "a codebook")

    def tensors(self) -> dict[str, Tensor]:
        """Return keys, values, radii, and everything else as JSON in bytes."""
        facts = [self.module, self.replacement, self.labels]
        parts = {"keys": self.keys, "values": self.values, "radii": self.radii}
        return {**parts, "facts": json_tensor(facts)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a codebook; see :meth:`Overlay.from_tensors`."""
        module, replacement, labels = json_value(tensors["facts"])
        keys, values, radii = (tensors[name] for name in ("keys", "values", "radii"))
        dimensions = (keys.dim(), values.dim(), radii.dim())
        if dimensions != (2, 2, 1) or not len(keys) == len(values) == len(radii) == len(labels):
            raise ValueError("a codebook has one key, value, radius and answer per entry")
        return cls(module, replacement, keys, values, radii, tuple(map(tuple, labels)))
