"""Side memories: copies of one linear layer that take texts over (WISE, Wang et al. 2024).

A memory is the difference Δ [out, in] of a copy from the layer. How much it has to say of a text
is the mean distance of both outputs over the prompt's tokens, A = mean_t |Δ a_t|. A text goes
through the memory with the largest A, among those whose A reaches their own threshold; with none
it goes through the layer itself, and nothing happens, bit by bit.
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


def movement(inputs: Tensor, change: Tensor) -> Tensor:
    """Return Δ a [R, T, out] of inputs a [R, T, in], in float32 or better."""
    states = at_least_float32(inputs)
    return linear(states, change.to(states))


def activation(moved: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return A [R]: the mean norm of ``moved`` [R, T, out] over columns ``first`` to ``last`` [R].

    Padding may hold anything.
    """
    columns = torch.arange(moved.shape[1], device=moved.device)
    inside = (columns >= first[:, None]) & (columns <= last[:, None])
    distances = torch.linalg.vector_norm(moved, dim=-1)
    return distances.where(inside, 0.0).sum(dim=1) / inside.sum(dim=1)


@dataclass(frozen=True)
class SideMemory(Overlay):
    """n memories beside the linear layer at the path ``module``; the last may be written on.

    A memory opens from ``ratio`` times its threshold on, which is the smallest activation of its
    own edits. The first ``merged`` memories are merged of several.
    """

    module: str
    ratio: float
    changes: Tensor  # [n, out, in], Δ
    thresholds: Tensor  # [n], ε
    mask: Tensor  # [out, in] bool, the entries that the last memory may use
    edits: tuple[int, ...]  # n, how many edits each holds
    merged: int = 0

    kind: ClassVar[str] = "side_memory"
    gated: ClassVar[bool] = True

    @property
    def entries(self) -> int:
        """Number n of memories."""
        return len(self.edits)

    def hooks(self, passage: Passage) -> Mapping[str, Hook]:
        """Let every text through the memory that takes it over."""
        return {self.module: lambda inputs, output: self._routed(passage, inputs, output)}

    def _routed(self, passage: Passage, inputs: Tensor, output: Tensor) -> Tensor:
        if not self.entries:
            return output
        chosen = passage.decided(self, lambda: self._decision(passage, inputs))
        taken = chosen[chosen >= 0].unique().tolist()
        if not taken:
            return output
        routed = output.clone()
        for memory in taken:
            rows = (chosen == memory).nonzero().flatten()
            moved = movement(inputs[rows], self.changes[memory])
            routed[rows] = (output[rows] + moved).to(output)
        return routed

    def _decision(self, passage: Passage, inputs: Tensor) -> Tensor:
        """Return the memory that takes each row over, [R], or −1."""
        first, last = passage.prompt_columns(inputs)
        found = [activation(movement(inputs, change), first, last) for change in self.changes]
        chosen = self.routes(torch.stack(found))
        passage.note_opened(chosen >= 0)
        return chosen

    def routes(self, activations: Tensor) -> Tensor:
        """Return the memory for each row, [R], or −1, given all activations [n, R]."""
        reached = activations >= self.ratio * self.thresholds.to(activations)[:, None]
        opened = reached & (activations > 0)
        best = activations.where(opened, -1.0).max(dim=0)
        return best.indices.where(best.values > 0, -1)

    def check(self, model: "EditableModel") -> None:
        """Refuse a model without this layer, or with one of another width."""
        check_beside(model, self.module, self.changes.shape[1:], "side memories")

    def tensors(self) -> dict[str, Tensor]:
        """Return changes, thresholds, mask, and everything else as JSON in bytes."""
        facts = [self.module, self.ratio, self.edits, self.merged]
        parts = {"changes": self.changes, "thresholds": self.thresholds, "mask": self.mask}
        return {**parts, "facts": json_tensor(facts)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild side memories; see :meth:`Overlay.from_tensors`."""
        module, ratio, edits, merged = json_value(tensors["facts"])
        changes, thresholds, mask = (tensors[k] for k in ("changes", "thresholds", "mask"))
        n = len(edits)
        if changes.shape != (n, *mask.shape) or thresholds.shape != (n,) or mask.dim() != 2:
            raise ValueError("side memories have one change, threshold and count each")
        return cls(module, ratio, changes, thresholds, mask, tuple(edits), merged)
