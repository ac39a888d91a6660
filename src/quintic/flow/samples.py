"""What is drawn from a flow, and the way between two latents.

Latents are about normal, so their lengths hardly differ, and a straight line between two of them passes through shorter
ones that no image has. So the way is that of spherical interpolation, with the angle w between a and b:

    (sin((1 - t) w) a + sin(t w) b) / sin w       for t from 0 to 1

If b points away from a, every direction is as short, and the way goes over a third point, always the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.core.counter_rng import Stream
from quintic.flow.invert import Inversion

__all__ = ["Samples", "great_circle"]


@dataclass(frozen=True)
class Samples:
    """Images of a flow, with what vouches for them."""

    images: Tensor
    """(n, c, h, w), pixels from about -1 to 1, denoised if that was asked for."""
    latents: Tensor
    """(n, c, h, w): where they came from."""
    inversions: tuple[Inversion, ...]
    """Certificates, one per batch."""
    redrawn: int
    """Images that were not finite and were drawn again."""


def great_circle(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Points between two, both included; of equally long ones evenly spaced in angle.

    On a straight line if they point the same way or one is 0. If they point away from each other, over a point at a
    right angle to both that is drawn once for all: as good a latent as any, where a straight line would pass 0.

    Args:
        a: Any shape.
        b: The same.
        steps: Points.

    Returns:
        (steps, ...).

    Example:
        >>> great_circle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3)
        tensor([[1.0000, 0.0000],
                [0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    t = torch.linspace(0, 1, steps, device="cpu").to(a).view(-1, *[1] * a.ndim)
    if cosine < 0 and a.numel() > 1 and _beside(b, a).norm() < 1e-4 * b.norm():
        third = _beside(torch.from_numpy(Stream(0, "great circle").normal(0, a.numel())).to(a).view(a.shape), a)
        third = third * (0.5 * (a.norm() + b.norm()) / third.norm())
        along = torch.cos(torch.pi * t)
        return along.clamp_min(0) * a + torch.sin(torch.pi * t) * third + (-along).clamp_min(0) * b
    if not angle.sin() >= 1e-6:  # NaN if one of them is 0
        return (1 - t) * a + t * b
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def _beside(x: Tensor, a: Tensor) -> Tensor:
    """The part of x at a right angle to a."""
    return x - (x * a).sum() / a.square().sum() * a
