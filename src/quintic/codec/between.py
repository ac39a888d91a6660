"""Predictions between two calls of the network, from what its errors look like.

What x_s tells beyond an earlier x_t is a noisy copy of the image of its own: with snr = exp(log_snr) and the sufficient
statistic eta = sqrt(snr (1 + snr)) x,

    eta_s - eta_t = delta x_0 + sqrt(delta) eps,     delta = snr_s - snr_t,     eps ~ N(0, I) independent of x_t.

Were the error x_0 - p of the network's prediction p at t Gaussian with covariance C, the posterior mean of x_0 at s
would be p + C (I + delta C)^-1 (eta_s - eta_t - delta p). With C = e S D^T B D S (see
:mod:`quintic.diffusion.residuals`) and the mean square s of S in the place of S S in the inverse, that is

    p + S D^T [e B / (1 + delta e s B)] D S (eta_s - eta_t - delta p),

two transforms. It explains half to three quarters of how a network's prediction moves in a step, so that the bits of a
few calls can be spread over many small steps: each discards the part of the last one's noise that an image cannot have.

Sums are of whole numbers below 2^53, the rest is elementwise: the same bits everywhere, for any number of images.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from quintic.codec.arithmetic import LN2, UNIT, exact_exp
from quintic.codec.codebook import Array
from quintic.codec.schedule import Curve
from quintic.diffusion.residuals import KNOTS, ONE, band_of, part_of, transforms

__all__ = ["SIZE", "Between", "Errors"]

_VALUE_BITS = 21
"""With 20 bits of the matrices and sides up to 512, sums stay below 2^52."""
_WIDER = 1.2
"""The error from the curve's slope is a tenth too low, and errors have longer tails than normal ones. A fifth more or
less costs 0.1 dB at most."""
_GAP = (KNOTS[1] - KNOTS[0]) * UNIT
_ONE = np.float32(1.0)
SIZE = 1.0 / (ONE * _GAP)
"""Unit of sizes between two tables."""


class Errors:
    """What a model's errors look like at any level, for one shape of images.

    Args:
        curve: Of the model, with residuals.
        shape: (c, h, w).
    """

    def __init__(self, curve: Curve, shape: tuple[int, int, int]) -> None:
        assert curve.residuals is not None
        self.shape = shape
        self._curve = curve
        c, h, w = shape
        self._sizes = np.array(curve.residuals.sizes)
        self._bands = np.array(curve.residuals.bands, dtype=np.float64)
        rows, columns = band_of(h), band_of(w)
        bands = np.arange(self._bands.shape[1]).reshape(c, rows[-1] + 1, columns[-1] + 1)
        self._band = bands[:, rows[:, None], columns].ravel()

    def at(self, level: int) -> tuple[NDArray[np.int64], Array]:
        """Relative size of errors by part of [-1, 1], in units of ``SIZE``, and mean square (d,) by frequency."""
        place = min(max(level - KNOTS[0] * UNIT, 0), _GAP * (len(KNOTS) - 1) - 1)
        knot, beyond = divmod(place, _GAP)
        sizes = self._sizes[knot] * (_GAP - beyond) + self._sizes[knot + 1] * beyond
        bands = (self._bands[knot] * (_GAP - beyond) + self._bands[knot + 1] * beyond) * SIZE
        error = _WIDER * 2.0 * LN2 * self._curve.bits_per_snr(min(level, 10 * UNIT - 1)) / self._band.size
        return sizes, (error * bands).take(self._band)


class Between:
    """Predictions after one call of a network.

    Args:
        errors: Of the model.
        x0: (n, c, h, w), what the network predicted, in [-1, 1].
        x: (n, d), from what.
        level: At which noise level, in 1/256 of log_snr.
    """

    def __init__(self, errors: Errors, x0: NDArray[np.float32], x: Array, level: int) -> None:
        self._shape = errors.shape
        self._x0 = x0.reshape(x.shape).astype(np.float64)
        self._snr = _snr(level)
        self._eta = _eta(x, self._snr)
        sizes, self._errors = errors.at(level)
        whole = sizes.take(part_of(self._x0))
        self._sizes = whole * SIZE
        squares = np.square(whole).sum(1, keepdims=True).astype(np.float64)
        self._shrunk = self._errors * (squares * (SIZE * SIZE) / x.shape[1])

    def predict(self, x: Array, level: int) -> NDArray[np.float32]:
        """The prediction at a later level: (n, d) to (n, c, h, w), in [-1, 1]."""
        snr = _snr(level)
        delta = snr - self._snr
        news = (_eta(x, snr) - self._eta) - delta * self._x0
        seen = _transform(self._sizes * news, self._shape, back=False)
        moved = _transform(self._errors / (1.0 + delta * self._shrunk) * seen, self._shape, back=True)
        x0 = (self._x0 + self._sizes * moved).astype(np.float32)
        return np.minimum(np.maximum(x0, -_ONE), _ONE).reshape(-1, *self._shape)


def _snr(level: int) -> float:
    return exact_exp(level / UNIT)


def _eta(x: Array, snr: float) -> Array:
    return math.sqrt(snr * (1.0 + snr)) * x


@functools.lru_cache(8)
def _matrices(shape: tuple[int, int, int], back: bool) -> tuple[Array, Array, Array]:
    """Of colours and rows, for multiplication from the left, and of columns, from the right."""
    colours, rows, columns = (np.ascontiguousarray(m.T if back else m) for m in transforms(shape))
    return colours, rows, np.ascontiguousarray(columns.T)


def _transform(x: Array, shape: tuple[int, int, int], *, back: bool) -> Array:
    """Cosine transform of rows and columns, colours rotated; or its transpose: (n, d) to (n, d)."""
    c, h, w = shape
    colours, rows, columns = _matrices(shape, back)
    # A power of two for each image, above all its values.
    exponent = np.frexp(np.abs(x).max(1, keepdims=True))[1] - _VALUE_BITS
    y = np.rint(x * np.ldexp(1.0, -exponent))
    y = np.rint(y.reshape(-1, w) @ columns)
    y = rows @ y.reshape(-1, h, w)
    if c == 3:
        y = colours @ np.rint(y).reshape(-1, 3, h * w)
    return y.reshape(x.shape) * np.ldexp(1.0, exponent)
