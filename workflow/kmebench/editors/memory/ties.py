"""TIES: one change of a weight that stands for several (Yadav et al. 2023, "TIES-Merging")."""

import torch
from torch import Tensor


def ties(changes: Tensor, density: float) -> Tensor:
    """Merge changes [n, ...]: trim, elect a sign for every entry, average what has it.

    Of each change the share ``density`` of its entries, the largest, is kept. An entry's sign is
    that of its sum, and plus for a sum of zero. Zeros never count in the average.
    """
    kept = torch.stack([_trimmed(change, density) for change in changes])
    elected = torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0).to(kept)
    agreeing = kept.sign() == elected
    return kept.where(agreeing, 0.0).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """Keep the largest entries; zeros are entries, too."""
    values = change.flatten()
    largest = values.abs().topk(int(density * len(values))).indices
    return torch.zeros_like(values).index_copy(0, largest, values[largest]).view_as(change)
