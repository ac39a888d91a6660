"""From bytes to the reals and back, with what it does to a density.

A picture has levels k in 0..L-1, a flow a density on the reals. Uniform dequantisation joins them (Theis et al. 2016):

    x = 2 (k + U) / L - 1, U uniform in [0, 1):    log P(k) = log E_U[p(x)] (2 / L)^d >= E_U[log p(x)] + d log(2 / L)

so bits per dimension is (-log p(x) / d + log(L / 2)) / log 2. With several U the mean is taken inside the logarithm, a
tighter bound (Burda et al. 2016). The logit transform puts the edges of the box, where most pixels of drawings
and digits lie, near infinity (Dinh et al. 2017): u = logit(a + (1 - 2 a) (x + 1) / 2), and its Jacobian is counted:

    log |du/dx| = log((1 - 2 a) / 2) - log s - log(1 - s),    s = a + (1 - 2 a) (x + 1) / 2

Here a is 1e-6, and the flow sees u / 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quintic.core import DataError

__all__ = ["bits", "dequantise", "log_normal", "logit_forward", "logit_inverse"]

EDGE = 1e-6
LOGIT_SCALE = 5.0
"""Logits of pixels are divided by it, so that the flow sees numbers of about the size of its noise."""


def dequantise(images: Tensor, noise: Tensor, levels: int) -> Tensor:
    """Integers in 0..levels-1 and noise in [0, 1) to reals in [-1, 1).

    Raises:
        DataError: ``images`` are not integers, or outside the levels.
    """
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise DataError(f"expected the levels of pixels as integers from 0 to {levels - 1}, found {images.dtype}")
    low, high = (int(v) for v in images.aminmax()) if images.numel() else (0, 0)
    if low < 0 or high >= levels:
        raise DataError(f"expected levels from 0 to {levels - 1}, found {low} to {high}")
    return (images.to(noise.dtype) + noise) * (2.0 / levels) - 1.0


def logit_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (b, ...) in [-1, 1] to scaled logits, and the log-determinant per image (b,).

    Outside the box the density is zero: the log-determinant is minus infinity there.
    """
    inside = (x >= -1).flatten(1).all(1) & (x <= 1).flatten(1).all(1)
    x = x.clamp(-1, 1)
    # 1 - s from 1 - x: near the upper edge the difference of rounded numbers would be lost.
    log_s = (EDGE + (1.0 - 2.0 * EDGE) * (1.0 + x) / 2.0).log()
    log_rest = (EDGE + (1.0 - 2.0 * EDGE) * (1.0 - x) / 2.0).log()
    constant = math.log((1.0 - 2.0 * EDGE) / 2.0 / LOGIT_SCALE)
    logdet = (constant - log_s - log_rest).flatten(1).sum(1)
    return (log_s - log_rest) / LOGIT_SCALE, torch.where(inside, logdet, -torch.inf)


def logit_inverse(u: Tensor) -> Tensor:
    """Scaled logits to pixels in [-1, 1]."""
    return ((torch.sigmoid(u * LOGIT_SCALE) - EDGE) / (1.0 - 2.0 * EDGE) * 2.0 - 1.0).clamp(-1, 1)


def bits(log_density: Tensor, dims: int, levels: int) -> Tensor:
    """Bits per dimension from the log-density of x in [-1, 1).

    Args:
        log_density: (b,) in nats, or (k, b) for k draws of the noise, averaged inside the logarithm.
        dims: Numbers of an image.
        levels: Of a pixel.

    Example:
        >>> bits(torch.tensor([-8 * math.log(2.0)]), 8, 256)    # the uniform density on the box
        tensor([8.])
    """
    if log_density.ndim == 2:
        log_density = torch.logsumexp(log_density, 0) - math.log(len(log_density))
    return (-log_density / dims + math.log(levels / 2.0)) / math.log(2.0)


def log_normal(z: Tensor, log_variance: Tensor | None) -> Tensor:
    """Log-density of (b, ...) under independent normals with mean 0, (b,).

    Args:
        z: Values.
        log_variance: Of each value, of the shape of one example; None is 0.
    """
    terms = z.square() if log_variance is None else z.square() * torch.exp(-log_variance) + log_variance
    return -0.5 * (terms + math.log(2.0 * math.pi)).flatten(1).sum(1)
