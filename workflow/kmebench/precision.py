"""Numbers in float32 or better: what is added up in a model's own dtype may be too coarse."""

import torch
from torch import Tensor


def promoted(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 as it is."""
    return tensor.to(promoted(tensor.dtype))
