"""Sparse memories: a matrix beside one linear layer, of which a text uses few columns (MEMOIR).

What the layer is given of a prompt, as a mean over its tokens and less that of other text, is its
feature f. The κ largest |f_j|, sent elsewhere by a fixed permutation π, are the columns I of the
matrix W_r that the prompt may use (Wang et al. 2025, "TopHash"). A text uses the stored columns
that share the most with its own, if they share enough: W a_t + W_r (m ∘ a_t). Else nothing
happens, bit by bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from kmebench.edits.overlays import Hook, Overlay, Passage, check_beside
from kmebench.io.tensors import json_tensor, json_value
from kmebench.precision import at_least_float32

if TYPE_CHECKING:
    from kmebench.models.editable import EditableModel


def mean_input(inputs: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return the mean [R, in] of inputs [R, T, in] over columns ``first`` to ``last`` [R].

    In float32 or better. Padding may hold anything.
    """
    columns = torch.arange(inputs.shape[1], device=inputs.device)
    inside = (columns >= first[:, None]) & (columns <= last[:, None])
    total = at_least_float32(inputs).where(inside[..., None], 0.0).sum(dim=1)
    return total / inside.sum(dim=1)[:, None]


def masked_product(inputs: Tensor, masks: Tensor, change: Tensor) -> Tensor:
    """Return W_r (m ∘ a_t) [R, T, out] of inputs a [R, T, in] and masks m, bool [R, in]."""
    states = at_least_float32(inputs)
    return linear(states * masks[:, None], change.to(states))


@dataclass(frozen=True)
class SparseMemory(Overlay):
    """A matrix beside the linear layer at the path ``module``, with the columns of n edits."""

    module: str
    threshold: float  # τ, share of columns that open the gate
    active: int  # κ
    change: Tensor  # [out, in], W_r
    masks: Tensor  # [n, in] bool
    order: Tensor  # [in] int64, π
    background: Tensor  # [in], the mean feature of other text

    kind: ClassVar[str] = "sparse_memory"
    gated: ClassVar[bool] = True

    def masks_of(self, means: Tensor) -> Tensor:
        """Return the columns that prompts may use, bool [R, in], given their means [R, in]."""
        feature = means - self.background.to(means)
        largest = feature.abs().topk(self.active, dim=1).indices
        masks = torch.zeros_like(means, dtype=torch.bool)
        return masks.scatter_(1, self.order.to(largest)[largest], True)

    def nearest(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest overlaps [R] of masks, bool [R, in], with stored ones, and which."""
        stored = self.masks.to(masks.device, torch.float32)
        shared = (masks.float() @ stored.T).max(dim=1)
        return shared.values / self.active, shared.indices

    def hooks(self, passage: Passage) -> Mapping[str, Hook]:
        """Add what the nearest edit has written, where it is near enough."""
        return {self.module: lambda inputs, output: self._routed(passage, inputs, output)}

    def _routed(self, passage: Passage, inputs: Tensor, output: Tensor) -> Tensor:
        if not len(self.masks):
            return output
        chosen = passage.decided(self, lambda: self._decision(passage, inputs))
        rows = (chosen >= 0).nonzero().flatten()
        if not len(rows):
            return output
        masks = self.masks.to(inputs.device)[chosen[rows]]
        routed = output.clone()
        added = masked_product(inputs[rows], masks, self.change)
        routed[rows] = (output[rows] + added).to(output)
        return routed

    def _decision(self, passage: Passage, inputs: Tensor) -> Tensor:
        """Return whose columns each row uses, [R], or −1."""
        means = mean_input(inputs, *passage.prompt_columns(inputs))
        overlap, entry = self.nearest(self.masks_of(means))
        opened = overlap >= self.threshold
        passage.note_opened(opened)
        return entry.where(opened, -1)

    def check(self, model: "EditableModel") -> None:
        """Refuse a model without this layer, or with one of another width."""
        check_beside(model, self.module, self.change.shape, "a sparse memory")

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, and everything else as JSON in bytes."""
        facts = [self.module, self.threshold, self.active]
        own = {name: getattr(self, name) for name in ("change", "masks", "order", "background")}
        return {**own, "facts": json_tensor(facts)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a sparse memory; see :meth:`Overlay.from_tensors`."""
        module, threshold, active = json_value(tensors["facts"])
        own = [tensors[name] for name in ("change", "masks", "order", "background")]
        widths = {tensor.shape[-1] for tensor in own}
        if len(widths) > 1 or [tensor.dim() for tensor in own] != [2, 2, 1, 1]:
            raise ValueError("change, masks, order and background are of one width")
        return cls(module, threshold, active, *own)
