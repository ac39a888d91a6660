"""How noisy an image is, as one number, and paths through that number from pure noise to the image.

    x_t = alpha x_0 + sigma eps,   alpha^2 + sigma^2 = 1,   log_snr = log(alpha^2 / sigma^2)

(post 10711 writes alpha-bar and beta-bar). Every network here is conditioned on ``log_snr`` and not on the number of a
step, so that any grid of steps can be used with it. A schedule is a falling function log_snr(t) of a time t in [0, 1],
where 0 is the image and 1 is noise:

* ``cosine``: alpha = cos(pi t / 2), that is log_snr = -2 log tan(pi t / 2) (Nichol and Dhariwal 2021, without offset);
* ``linear``: alpha^2 = exp(-b0 t - (b1 - b0) t^2 / 2) with b0 = 0.1, b1 = 20, the limit of DDPM's beta from 1e-4 to
  0.02 in 1000 steps (Ho et al. 2020; Song et al. 2021);
* ``log-snr``: log_snr falls linearly from maximum to minimum.

The first two move by ``shift`` (Hoogeboom et al. 2023: negative for large images) and are cut to [minimum, maximum].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.core.settings import check_counts

__all__ = ["SCHEDULES", "NoiseSchedule", "alpha_sigma"]

SCHEDULES = ("cosine", "linear", "log-snr")

_BETA_0, _BETA_1 = 0.1, 20.0


def alpha_sigma(log_snr: float | Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale of the image and of the noise at a noise level, computed in float64.

    Args:
        log_snr: A number or a tensor (b,).
        like: If given, the results have its dtype, its device, and axes of length 1 behind the first to multiply it.

    Returns:
        alpha and sigma, positive, with alpha^2 + sigma^2 = 1.

    Example:
        >>> [round(float(v), 4) for v in alpha_sigma(0.0)]
        [0.7071, 0.7071]
    """
    level = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu")
    alpha, sigma = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()
    if like is None:
        return alpha, sigma
    if level.ndim:
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = alpha.view(shape), sigma.view(shape)
    return alpha.to(like), sigma.to(like)


@dataclass(frozen=True)
class NoiseSchedule:
    """A path of noise levels.

    Raises:
        ConfigError: Unknown name, or the ends are in the wrong order.

    Example:
        >>> schedule = NoiseSchedule("cosine")
        >>> abs(schedule.log_snr(0.5)) < 1e-12, round(schedule.time(0.0), 6)
        (True, 0.5)
        >>> [round(level, 1) for level in NoiseSchedule("log-snr", -10, 10).grid(3)]
        [-10.0, 0.0, 10.0]
    """

    name: str = "cosine"
    """cosine, linear or log-snr."""
    minimum: float = -10.0
    """log_snr of what counts as pure noise."""
    maximum: float = 10.0
    """log_snr of what counts as a clean image; 10 is a noise of 0.9 grey levels of 255."""
    shift: float = 0.0
    """Added to log_snr at every time; positive spends more of the time on little noise. Not for log-snr."""

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(f"unknown noise schedule {self.name!r}{suggest(self.name, SCHEDULES)}")
        if not -math.inf < self.minimum < self.maximum < math.inf:
            raise ConfigError(f"a noise schedule needs minimum < maximum, found {self.minimum} and {self.maximum}")
        if self.shift and self.name == "log-snr":
            raise ConfigError("a log-snr schedule is set by its minimum and maximum; leave shift at 0")

    def log_snr(self, t: float) -> float:
        """Noise level at time t in [0, 1]: ``maximum`` at 0, falling to ``minimum`` at 1."""
        if not 0.0 <= t <= 1.0:
            raise ConfigError(f"time of a noise schedule must be in [0, 1], found {t}")
        if self.name == "log-snr":
            return self.maximum + (self.minimum - self.maximum) * t
        if t == 0.0:
            return self.maximum
        if self.name == "cosine":
            level = -2.0 * math.log(math.tan(math.pi * t / 2.0)) if t < 1.0 else -math.inf
        else:
            integral = _BETA_0 * t + 0.5 * (_BETA_1 - _BETA_0) * t * t
            level = -math.log(math.expm1(integral))
        return min(self.maximum, max(self.minimum, level + self.shift))

    def time(self, log_snr: float) -> float:
        """The time at which a level is reached; the inverse of :meth:`log_snr` strictly inside the ends."""
        level = min(self.maximum, max(self.minimum, log_snr))
        if self.name == "log-snr":
            return (self.maximum - level) / (self.maximum - self.minimum)
        level -= self.shift
        if self.name == "cosine":
            return 2.0 / math.pi * math.atan(math.exp(-level / 2.0))
        # b0 t + (b1 - b0) t^2 / 2 = log(1 + exp(-level)), solved without cancellation.
        integral = math.log1p(math.exp(-level))
        slope = _BETA_1 - _BETA_0
        return 2.0 * integral / (_BETA_0 + math.sqrt(_BETA_0**2 + 2.0 * slope * integral))

    def grid(self, levels: int) -> list[float]:
        """Noise levels at equal steps of time, from noise to image, between the times when the cut ends are reached."""
        check_counts(2, levels=levels)
        first, last = min(1.0, self.time(self.minimum)), self.time(self.maximum)
        return [self.log_snr(first + (last - first) * i / (levels - 1)) for i in range(levels)]
