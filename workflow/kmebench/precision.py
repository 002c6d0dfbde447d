"""Numbers in float32 or float64: what is added up in a model's own dtype may be too coarse."""

import torch
from torch import Tensor

#: Types of devices without float64.
SINGLE = {"mps"}


def promoted(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 as it is."""
    return tensor.to(promoted(tensor.dtype))


def exact_place(device: torch.device) -> torch.device:
    """Return where to compute in float64 for a device: there, or on the CPU if it cannot."""
    return torch.device("cpu") if device.type in SINGLE else device


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, at the :func:`exact_place` of its device."""
    return tensor.to(exact_place(tensor.device)).double()
