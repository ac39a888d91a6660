"""How much a noisy image tells about the clean one: the information curve of a model.

It grows with the signal-to-noise ratio by half the denoiser's squared error,

    dI / d snr = 1/2 E |x_0 - E[x_0 | x]|^2   (Guo, Shamai, Verdu 2005),   snr = exp(log_snr),

so that a denoiser's own errors on validation images are its information curve; a Gaussian's is known exactly. Noise
levels are whole numbers of 1/256 log_snr and a curve is whole numbers of 1/64 bit: what follows from both is the same
on every platform.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quintic.codec.arithmetic import UNIT, exact_exp
from quintic.core import ConfigError

if TYPE_CHECKING:  # reading a file's header takes no torch
    from quintic.diffusion.residuals import Residuals

__all__ = ["FIRST", "LAST", "Curve", "snr_at"]

FIRST, LAST = -10 * UNIT, 10 * UNIT
"""The noisiest and the cleanest level of a curve, in 1/256 of log_snr."""
_KNOT = UNIT // 4
_FRACTION = 64
_UNITS = _FRACTION * _KNOT


def snr_at(level: int) -> float:
    """The signal-to-noise ratio at a level, the same number on every platform."""
    return exact_exp(level / UNIT)


@dataclass(frozen=True)
class Curve:
    """Information of a noisy image about the clean one at log_snr -10, -9.75, ... 10.

    Example:
        >>> curve = Curve.from_information(lambda log_snr: 100.0 * math.log1p(math.exp(log_snr)))
        >>> [round(curve.level(bits) / 256, 2) for bits in (100, 200, 400)]
        [0.0, 1.09, 2.71]
    """

    knots: tuple[int, ...]
    """In 1/64 bit per image, rising from 0."""
    residuals: Residuals | None = None
    """What the model's errors look like; presets of fewer calls than steps need it."""

    def __post_init__(self) -> None:
        if len(self.knots) != 81 or self.knots[0] != 0 or any(a > b for a, b in itertools.pairwise(self.knots)):
            raise ConfigError("an information curve is 81 whole numbers that rise from 0")
        if not self.knots[-1]:
            raise ConfigError("an information curve must rise: this one says that images tell nothing")

    @classmethod
    def from_information(cls, nats: Callable[[float], float], residuals: Residuals | None = None) -> Curve:
        """From nats per image at a log_snr: the ``information`` of a GaussianDenoiser or of an ErrorCurve."""
        start = nats(FIRST / UNIT)
        values = [(nats(level / UNIT) - start) / math.log(2.0) for level in cls.levels()]
        return cls(tuple(round(_FRACTION * value) for value in values), residuals)

    @staticmethod
    def levels() -> range:
        """The noise levels of the knots, in 1/256 of log_snr."""
        return range(FIRST, LAST + 1, _KNOT)

    @property
    def bits(self) -> float:
        """Information at the last knot."""
        return self.knots[-1] / _FRACTION

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the knots."""
        return hashlib.sha256(",".join(map(str, self.knots)).encode()).hexdigest()

    def at(self, level: int) -> int:
        """Information at a noise level, linear between knots, in 1/4096 bit."""
        if level >= LAST:
            return self.knots[-1] * _KNOT
        i, beyond = divmod(level - FIRST, _KNOT)
        return self.knots[i] * _KNOT + (self.knots[i + 1] - self.knots[i]) * beyond

    def level(self, bits: int, parts: int = 1) -> int:
        """The noise level at which ``bits / parts`` bits are reached, linear between knots, at most the last."""
        wanted = bits * _FRACTION
        i = bisect.bisect_left(self.knots, wanted, key=lambda knot: knot * parts)
        if i == 0:
            return FIRST
        if i == len(self.knots):
            return LAST
        low, high = self.knots[i - 1] * parts, self.knots[i] * parts
        return FIRST + _KNOT * (i - 1) + _KNOT * (wanted - low) // (high - low)

    def bits_per_snr(self, level: int) -> float:
        """Half the squared error at a noise level below the last, in bits.

        A difference over a quarter of log_snr, or more if the curve gains less than 2 bits there.
        """
        start = self.at(level)
        end = min(LAST, max(level + _KNOT, self.level(start + 2 * _UNITS, _UNITS)))
        return (self.at(end) - start) / _UNITS / (snr_at(end) - snr_at(level))
