"""How well a denoiser predicts at each noise level, and so how many bits a noisy image holds.

    dI / dsnr = mmse(snr) / 2      (Guo, Shamai and Verdu 2005),   so   I(l) = 1/2 integral of exp(u) d mse(u) du, u < l

with l = log_snr, d values per image and mse per value. For an imperfect denoiser the same integral bounds what its
owner must send. The codec spaces its noise levels by it, and it compares denoisers before anything is coded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.core.settings import check_counts
from quintic.diffusion.denoiser import Denoiser
from quintic.diffusion.noise_schedule import alpha_sigma
from quintic.diffusion.residuals import Residuals
from quintic.diffusion.samplers import check_levels, seeded_noise

__all__ = ["ErrorCurve", "measure_errors"]


@dataclass(frozen=True)
class ErrorCurve:
    """Mean squared error per value against the noise level.

    Raises:
        ConfigError: Fewer than two levels, levels that do not rise, or an error that is not positive.

    Example:
        >>> curve = ErrorCurve((-2.0, 0.0, 2.0), (0.5, 0.3, 0.1), 4)
        >>> round(curve.mmse(1.0), 4), curve.information(2.0) > curve.information(0.0) > 0
        (0.1732, True)
    """

    levels: tuple[float, ...]
    """Rising log_snr."""
    errors: tuple[float, ...]
    """Mean squared error of the predicted image at each, per value, for images in [-1, 1]."""
    values: int
    """d, values per image."""
    residuals: Residuals | None = None
    """What its errors look like, if that was measured."""

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if len(self.levels) < 2 or len(self.errors) != len(self.levels) or min(self.errors) <= 0 or self.values < 1:
            raise ConfigError("an error curve needs two levels or more, a positive error for each, and values > 0")

    def mmse(self, log_snr: float) -> float:
        """The error at a level: log-linear between those measured, that of the end outside."""
        return float(np.exp(np.interp(log_snr, self.levels, np.log(self.errors))))

    def information(self, log_snr: float) -> float:
        """Nats that a noisy image holds about the clean one."""
        first = self.levels[0]
        # Below the first level the error is that of knowing nothing: the integral of exp is exp.
        total = math.exp(min(log_snr, first)) * self.errors[0]
        inner = [level for level in self.levels if level < log_snr]
        ends = [*inner, log_snr] if log_snr > first else []
        for left, right in itertools.pairwise(ends):
            total += _log_linear_integral(
                left, right, math.exp(left) * self.mmse(left), math.exp(right) * self.mmse(right)
            )
        return 0.5 * self.values * total


def _log_linear_integral(left: float, right: float, f_left: float, f_right: float) -> float:
    """Integral of a function whose logarithm is linear between two points."""
    slope = math.log(f_right / f_left)
    if abs(slope) < 1e-6:
        return 0.5 * (f_left + f_right) * (right - left)
    return (f_right - f_left) / slope * (right - left)


@torch.no_grad()
def measure_errors(
    denoiser: Denoiser, images: Tensor, levels: Sequence[float], *, seed: int = 0, batch: int = 100
) -> ErrorCurve:
    """Measure a denoiser on images it was not trained on.

    Args:
        denoiser: Any.
        images: (n, c, h, w) in [-1, 1].
        levels: Rising log_snr.
        seed: Of the noise, which is the same at every level.
        batch: Images per call.

    Raises:
        ConfigError: The levels do not rise, there are fewer than two, or ``batch`` is less than 1.
        DataError: No images.
    """
    check_levels(levels)
    check_counts(batch=batch)
    if not len(images):
        raise DataError("the errors of a denoiser are measured on one image or more, found none")
    sums = np.zeros(len(levels))
    for start in range(0, len(images), batch):
        x0 = images[start : start + batch].float()
        noise = seeded_noise(seed, len(x0), denoiser.shape, first=start)(0).to(x0)
        for i, level in enumerate(levels):
            alpha, sigma = alpha_sigma(level, x0)
            error = denoiser.predict_x0(alpha * x0 + sigma * noise, level) - x0
            sums[i] += float(error.square().cpu().sum(dtype=torch.float64))
    d = math.prod(denoiser.shape)
    return ErrorCurve(tuple(map(float, levels)), tuple((sums / (len(images) * d)).tolist()), d)
