"""Where numbers of 64 bits are to be had: Apple's GPUs have none, and raise a TypeError."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "in_float64"]

_WITHOUT_FLOAT64 = frozenset({"mps"})


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of a device, for sums and norms that stay there: float64, or float32 if it has none."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def in_float64(t: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its own device has no such numbers.

    Example:
        >>> in_float64(torch.ones(2)).dtype
        torch.float64
    """
    return (t.cpu() if t.device.type in _WITHOUT_FLOAT64 else t).double()
