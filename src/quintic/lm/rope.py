"""Rotary position embedding: rotate pair i of a vector at position p by the angle p * theta^(-2i/d).

Source: Su et al., RoFormer, arXiv 2104.09864. Neighbouring components form a pair, as in DeepSeek-V3.
Rotations make the product of a query at p and a key at q depend on p - q only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate", "rotation_table"]


def rotation_table(positions: int, dim: int, theta: float) -> Tensor:
    """Cosines and sines of every position.

    Args:
        positions: Number of positions from 0.
        dim: Width of the rotated part, even.
        theta: Base of the frequencies.

    Returns:
        (2, positions, dim / 2) float32; computed in float64.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate (batch, heads, time, dim) by a table of (2, time, dim / 2); keeps the dtype of x."""
    cos, sin = table[0].to(x.dtype), table[1].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
