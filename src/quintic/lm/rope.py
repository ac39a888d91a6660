"""Rotary position embedding: turn pair i of a vector at position p by the angle p * theta^(-2i/d).

Source: Su et al., RoFormer, arXiv 2104.09864. Neighbouring components form a pair, as in DeepSeek-V3, so a pair is a
complex number and a turn is a product. Turns make the product of a query at p and a key at q depend on p - q only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate", "rotation_table"]


def rotation_table(positions: int, dim: int, theta: float, *, still: int = 0) -> Tensor:
    """The turn of every pair at every position.

    Args:
        positions: Number of positions from 0.
        dim: Width of the part that turns, even.
        theta: Base of the frequencies.
        still: Width of a part before it that does not turn, even.

    Returns:
        (positions, (still + dim) / 2) complex64 of modulus 1, on torch's default device; computed in double precision.
    """
    with torch.device("cpu"):  # the same bits everywhere, and some devices have no float64
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        frequency = torch.cat([torch.zeros(still // 2, dtype=torch.float64), frequency])
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
        table = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    return table.to(torch.get_default_device())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn (..., time, dim) by a table of (time, dim / 2), or (time, dim / 2, 2) real numbers; keeps the dtype of x.

    Example:
        >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), rotation_table(2, 2, 1.0)).round(decimals=4)
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if not table.is_complex():  # the compiler fuses real numbers only
        (cos, sin), (a, b) = table.unbind(-1), wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
