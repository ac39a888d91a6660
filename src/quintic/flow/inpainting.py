"""Filling in pixels by the density itself: Langevin steps that are accepted or not.

    x' = x + t grad log p(x) + sqrt(2 t) noise, on the unknown pixels, kept with probability min(1, a), where
    log a = log p(x') - log p(x) + log q(x | x') - log q(x' | x)

(MALA, Roberts and Tweedie 1996.) Since a flow's density is exact, so is what the chain tends to: the distribution of
the unknown pixels given the known ones. The size t is adapted, per image, in the first half of the steps, then kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.core.counter_rng import Stream
from quintic.core.settings import check_counts
from quintic.flow.precision import full_precision
from quintic.flow.tarflow import TarFlow

__all__ = ["Inpainting", "inpaint"]

_ACCEPTANCE = 0.57  # the best one for these steps in many dimensions


@dataclass(frozen=True)
class Inpainting:
    """Images with their unknown pixels filled in."""

    images: Tensor
    """(b, c, h, w); known pixels are as they were."""
    acceptance: Tensor
    """(b,) share of steps accepted in the second half; much below 0.3 wants more steps."""


def inpaint(
    model: TarFlow,
    images: Tensor,
    known: Tensor,
    labels: Tensor | int | None = None,
    *,
    steps: int = 500,
    step_size: float | None = None,
    seed: int = 0,
) -> Inpainting:
    """Draw the unknown pixels of images given the known ones.

    For a flow of noisy images the known pixels get that noise first, and the result is denoised.

    Args:
        model: The flow.
        images: (b, c, h, w), pixels from -1 to 1; what stands in unknown places is where the chain begins.
        known: Of the images' shape, or one that broadcasts to it, bool.
        labels: As of :meth:`TarFlow.forward`.
        steps: Of the chain, each a pass forward and backward.
        step_size: The first t; None is a tenth of sigma^2 for gaussian noise, 1e-4 for uniform.
        seed: Of all noise.

    Raises:
        ConfigError: ``steps`` or ``step_size`` is not positive, or the weights are in half precision.
        DataError: Images or a mask of another shape or dtype, or the density of an image is 0 to begin with.
    """
    check_counts(steps=steps)
    if step_size is not None and not 0.0 < step_size < math.inf:
        raise ConfigError(f"step_size = {step_size!r}; expected a positive number, or None for the usual one")
    if images.ndim != 4 or tuple(images.shape[1:]) != model.shape or not images.is_floating_point():
        raise DataError(
            f"expected images (batch, {', '.join(map(str, model.shape))}) with pixels from -1 to 1, "
            f"found {tuple(images.shape)} of {images.dtype}"
        )
    known = _mask(known, images)
    draws = Stream(seed, "inpainting")
    size = images.numel()

    def normal(number: int) -> Tensor:
        return torch.from_numpy(draws.normal(number * size, size)).to(images).view(images.shape)

    gaussian = model.noise == "gaussian"
    x = images + model.sigma * normal(0) if gaussian else images.clone()
    usual = 0.1 * model.sigma**2 if gaussian else 1e-4
    first = usual if step_size is None else step_size
    t = torch.full((len(x), 1, 1, 1), first, dtype=x.dtype, device=x.device)
    uniform = torch.from_numpy(Stream(seed, "inpainting", "accept").uniform(0, steps * len(x))).to(x)
    value, slope = _value_and_slope(model, x, known, labels)
    if not value.isfinite().all():
        raise DataError("an image to be filled in has no density under this flow; begin from other pixels")
    accepted = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for step in range(steps):
        noise = normal(1 + step).masked_fill(known, 0.0)
        moved = x + t * slope + (2 * t).sqrt() * noise
        new_value, new_slope = _value_and_slope(model, moved, known, labels)
        back = (x - moved - t * new_slope).masked_fill(known, 0.0)
        log_a = new_value - value + 0.5 * noise.square().flatten(1).sum(1) - (back.square() / (4 * t)).flatten(1).sum(1)
        take = uniform[step * len(x) : (step + 1) * len(x)].log() < log_a  # False for NaN
        mask = take[:, None, None, None]
        x, slope, value = (
            torch.where(mask, moved, x),
            torch.where(mask, new_slope, slope),
            torch.where(take, new_value, value),
        )
        if step < steps // 2:
            t = t * torch.exp((take.to(x) - _ACCEPTANCE) / (1 + step) ** 0.5)[:, None, None, None]
        else:
            accepted += take.to(x)
    if gaussian:
        x = model.denoise(x, labels)
    return Inpainting(torch.where(known, images, x), accepted / max(1, steps - steps // 2))


def _mask(known: Tensor, images: Tensor) -> Tensor:
    """The mask in the shape and on the device of the images."""
    if known.dtype != torch.bool:
        raise DataError(f"known must be a mask of bool, True where a pixel is kept, found {known.dtype}: known > 0")
    try:
        return torch.broadcast_to(known, images.shape).to(images.device)
    except RuntimeError:
        raise DataError(
            f"known has shape {tuple(known.shape)}; expected that of the images, {tuple(images.shape)}, or one that "
            "broadcasts to it, such as (height, width)"
        ) from None


def _value_and_slope(model: TarFlow, x: Tensor, known: Tensor, labels: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """log p (b,) and its gradient with respect to the unknown pixels."""
    with torch.enable_grad(), full_precision(model.stack[0].position):
        variable = x.detach().clone().requires_grad_()
        value = model.log_prob(variable, labels)
        (slope,) = torch.autograd.grad(value.sum(), variable)
    return value.detach(), slope.masked_fill(known, 0.0)
