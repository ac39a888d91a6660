"""From noise to images with any denoiser, on any grid of noise levels.

One reverse step from level s to the cleaner level t, with r = exp(s - t) the ratio of their signal-to-noise ratios:

    q(x_t | x_s, x_0) = N( (r alpha_t / alpha_s) x_s + alpha_t (1 - r) x_0,  sigma_t^2 (1 - r) I )

Ancestral sampling (Ho et al. 2020) draws from it with the predicted x_0; post 10711 and the codec choose its noise from
a codebook. DDIM (Song et al. 2021) keeps the noise it has: x_t = alpha_t x_0 + sigma_t (x_s - alpha_s x_0) / sigma_s.
Both end with the prediction at the last level, so that T levels take T calls and T - 1 draws after the first.

Noise is a pure function of (seed, number of the image, step): neither the batch nor the number of images changes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.core.settings import check_counts
from quintic.diffusion.denoiser import Denoiser
from quintic.diffusion.guidance import told
from quintic.diffusion.noise_schedule import alpha_sigma

__all__ = ["Noise", "ancestral_sample", "check_levels", "ddim_sample", "reverse_step", "seeded_noise"]

Noise = Callable[[int], Tensor]
"""Step number (0 is the start) to standard normal noise (n, c, h, w)."""


def seeded_noise(seed: int, count: int, shape: tuple[int, int, int], first: int = 0) -> Noise:
    """Noise of images ``first`` to ``first + count - 1`` of a seed.

    Example:
        >>> both, second = seeded_noise(0, 2, (1, 2, 2)), seeded_noise(0, 1, (1, 2, 2), first=1)
        >>> bool((both(7)[1:] == second(7)).all())
        True
    """
    streams = [Stream(seed, "image noise", first + i) for i in range(count)]
    d = math.prod(shape)

    def noise(step: int) -> Tensor:
        rows = [torch.from_numpy(stream.normal(step * d, d)) for stream in streams]
        return torch.stack(rows).float().view(count, *shape)

    return noise


def reverse_step(level: float, following: float) -> tuple[float, float, float]:
    """Coefficients of the reverse step between two noise levels.

    Args:
        level: log_snr of the image at hand.
        following: log_snr after the step, larger.

    Returns:
        (a, b, std): the step goes to ``a x + b x_0 + std z`` with standard normal z.

    Example:
        >>> [round(c, 4) for c in reverse_step(-1.0, 1.0)]
        [0.2231, 0.7393, 0.4822]
    """
    if not following > level:
        raise ConfigError(f"a reverse step goes to a larger log_snr, found {level} to {following}")
    (alpha_s, _), (alpha_t, sigma_t) = alpha_sigma(level), alpha_sigma(following)
    kept = -math.expm1(level - following)
    a = math.exp(level - following) * float(alpha_t) / float(alpha_s)
    return a, float(alpha_t) * kept, float(sigma_t) * math.sqrt(kept)


def check_levels(levels: Sequence[float]) -> None:
    """Refuse a grid that does not rise.

    Raises:
        ConfigError: Empty, not finite, or not strictly increasing.
    """
    rises = all(a < b for a, b in itertools.pairwise(levels))
    if not len(levels) or not rises or not all(map(math.isfinite, levels)):
        raise ConfigError(f"noise levels must rise from noise to image, found {list(levels)[:6]} ...")


@torch.no_grad()
def ancestral_sample(
    denoiser: Denoiser,
    count: int,
    levels: Sequence[float],
    *,
    labels: Tensor | int | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    noise: Noise | None = None,
    clip: bool = True,
) -> Tensor:
    """Draw images as DDPM does.

    Args:
        denoiser: Any.
        count: Number of images.
        levels: Rising log_snr, for example ``NoiseSchedule("cosine").grid(50)``; one call of the denoiser each.
        labels: Class of all, or (count,) classes, of a denoiser that has some; -1 is "no class", and so is None.
        guidance: How far predictions go beyond the class (:mod:`quintic.diffusion.guidance`); 0 not at all, 1 to 3 is
            usual. It takes two calls of the denoiser for each level.
        seed: Of the noise.
        noise: Used instead of the seed's: step to (count, c, h, w).
        clip: Clip predictions to [-1, 1], as images are.

    Returns:
        (count, c, h, w) float32.

    Raises:
        ConfigError: The levels do not rise, there are no images, or labels do not fit the denoiser.

    Example:
        >>> from quintic.diffusion import GaussianDenoiser, NoiseSchedule
        >>> flat = GaussianDenoiser(torch.zeros(1, 2, 2), torch.eye(4), torch.full((4,), 0.1))
        >>> ancestral_sample(flat, 3, NoiseSchedule("cosine").grid(10)).shape
        torch.Size([3, 1, 2, 2])
    """

    def move(x: Tensor, x0: Tensor, level: float, following: float, z: Callable[[], Tensor]) -> Tensor:
        a, b, std = reverse_step(level, following)
        return a * x + b * x0 + std * z()

    return _sample(denoiser, count, levels, labels, guidance, seed, noise, clip, move)


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    count: int,
    levels: Sequence[float],
    *,
    labels: Tensor | int | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    noise: Noise | None = None,
    clip: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw images with noise at the start only.

    The arguments are those of :func:`ancestral_sample`, and ``check``: called before every step, and what it raises
    ends the sampling.
    """

    def move(x: Tensor, x0: Tensor, level: float, following: float, _: Callable[[], Tensor]) -> Tensor:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(level), alpha_sigma(following)
        return float(alpha_t) * x0 + float(sigma_t / sigma_s) * (x - float(alpha_s) * x0)

    return _sample(denoiser, count, levels, labels, guidance, seed, noise, clip, move, check)


def _sample(
    denoiser: Denoiser,
    count: int,
    levels: Sequence[float],
    labels: Tensor | int | None,
    guidance: float,
    seed: int,
    noise: Noise | None,
    clip: bool,
    move: Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor],
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    check_levels(levels)
    check_counts(count=count)
    denoiser = told(denoiser, count, labels, guidance)
    draw = seeded_noise(seed, count, denoiser.shape) if noise is None else noise
    x = draw(0)
    for step, level in enumerate(levels):
        check()
        x0 = denoiser.predict_x0(x, level)
        if clip:
            x0 = x0.clamp(-1.0, 1.0)
        if step + 1 == len(levels):
            return x0
        x = move(x, x0, level, levels[step + 1], lambda: draw(step + 1))  # noqa: B023
    raise AssertionError
