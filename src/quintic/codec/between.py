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
from quintic.diffusion.residuals import KNOTS, ONE, Residuals, band_of, part_of, transforms

__all__ = ["Between"]

_VALUE_BITS = 21
"""With 20 bits of the matrices and sides up to 512, sums stay below 2^52."""
_WIDER = 1.2
"""The error from the curve's slope is a tenth too low, and errors have longer tails than normal ones. A fifth more or
less costs 0.1 dB at most."""
_GAP = (KNOTS[1] - KNOTS[0]) * UNIT


class Between:
    """Predictions after one call of a network.

    Args:
        curve: Of the model, with residuals.
        x0: (n, c, h, w), what the network predicted, in [-1, 1].
        x: (n, d), from what.
        level: At which noise level, in 1/256 of log_snr.
    """

    def __init__(self, curve: Curve, x0: NDArray[np.float32], x: Array, level: int) -> None:
        assert curve.residuals is not None
        shape = c, h, w = x0.shape[1], x0.shape[2], x0.shape[3]
        self._shape = shape
        self._x0 = x0.astype(np.float64)
        self._snr = _snr(level)
        self._eta = _eta(x, self._snr)
        place = min(max(level - KNOTS[0] * UNIT, 0), _GAP * (len(KNOTS) - 1) - 1)
        knot, beyond = divmod(place, _GAP)
        scale = 1.0 / (ONE * _GAP)
        low, high = curve.residuals.sizes[knot], curve.residuals.sizes[knot + 1]
        sizes = np.array([a * (_GAP - beyond) + b * beyond for a, b in zip(low, high, strict=True)])
        whole = sizes[part_of(x0)]
        self._sizes = whole * scale
        squares = np.square(whole).sum((1, 2, 3), keepdims=True).astype(np.float64)
        square = squares * (scale * scale) / (c * h * w)
        tables = _bands(curve.residuals, shape)
        bands = (tables[knot] * (_GAP - beyond) + tables[knot + 1] * beyond) * scale
        error = _WIDER * 2.0 * LN2 * curve.bits_per_snr(min(level, 10 * UNIT - 1)) / (c * h * w)
        self._errors = error * bands
        self._shrunk = self._errors * square

    def predict(self, x: Array, level: int) -> NDArray[np.float32]:
        """The prediction at a later level: (n, d) to (n, c, h, w), in [-1, 1]."""
        snr = _snr(level)
        delta = snr - self._snr
        news = (_eta(x, snr) - self._eta).reshape(self._x0.shape) - delta * self._x0
        seen = _transform(self._sizes * news, self._shape, back=False)
        moved = _transform(self._errors / (1.0 + delta * self._shrunk) * seen, self._shape, back=True)
        return np.clip(self._x0 + self._sizes * moved, -1.0, 1.0).astype(np.float32)


def _snr(level: int) -> float:
    return exact_exp(level / UNIT)


def _eta(x: Array, snr: float) -> Array:
    return math.sqrt(snr * (1.0 + snr)) * x


@functools.lru_cache(8)
def _bands(residuals: Residuals, shape: tuple[int, int, int]) -> Array:
    """(knots, c, h, w): the table of bands at every frequency."""
    c, h, w = shape
    rows, columns = band_of(h), band_of(w)
    tables = np.array(residuals.bands, dtype=np.float64)
    return tables.reshape(len(tables), c, rows[-1] + 1, columns[-1] + 1)[:, :, rows[:, None], columns]


def _transform(x: Array, shape: tuple[int, int, int], *, back: bool) -> Array:
    """Cosine transform of rows and columns, colours rotated; or its transpose."""
    colours, rows, columns = (m.T if back else m for m in transforms(shape))
    # A power of two for each image, above all its values.
    exponent = np.frexp(np.abs(x).max((1, 2, 3), keepdims=True))[1]
    y = np.rint(np.ldexp(x, _VALUE_BITS - exponent))
    y = np.rint(y @ columns.T)
    y = rows @ y
    if shape[0] == 3:
        y = colours @ np.rint(y).reshape(len(x), 3, -1)
    return np.ldexp(y.reshape(x.shape), exponent - _VALUE_BITS)
