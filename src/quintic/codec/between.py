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

Sums are of whole numbers below 2^53, in single precision 2^24, the rest is elementwise: the same bits everywhere, for
any number of images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from quintic.codec.arithmetic import LN2, UNIT
from quintic.codec.codebook import Array, precision
from quintic.codec.curve import LAST, Curve, snr_at
from quintic.diffusion.residuals import KNOTS, ONE, PARTS, Residuals, band_of, transforms

__all__ = ["Between", "Errors"]

_VALUE_BITS = 21
"""With 20 bits of the matrices and sides up to 512, sums stay below 2^52."""
_SINGLE_BITS = 9
"""Of the matrices in single precision, whose sums of whole numbers must stay below 2^24."""
_WIDER = 1.2
"""The error from the curve's slope is a tenth too low, and errors have longer tails than normal ones. A fifth more or
less costs 0.1 dB at most."""
_GAP = (KNOTS[1] - KNOTS[0]) * UNIT
_ONE = np.float32(1.0)
_SIZE = 1.0 / (ONE * _GAP)  # the unit of sizes between two tables


class Errors:
    """What a model's errors look like at some levels, for one shape of images.

    Args:
        curve: Of the model, with residuals.
        shape: (c, h, w).
        levels: Those of :meth:`at`.
        single: Compute in single precision.
    """

    def __init__(
        self, curve: Curve, shape: tuple[int, int, int], levels: Iterable[int], *, single: bool = False
    ) -> None:
        assert curve.residuals is not None
        self.shape = shape
        self.single = single
        number = precision(single)
        known = list(levels)
        places = np.clip(np.array(known) - KNOTS[0] * UNIT, 0, _GAP * (len(KNOTS) - 1) - 1)
        knots, beyond = np.divmod(places[:, None], _GAP)
        sizes, bands, band = _tables(curve.residuals, shape)
        knots = knots[:, 0]
        whole = sizes[knots] * (_GAP - beyond) + sizes[knots + 1] * beyond
        parts = (bands[knots] * (_GAP - beyond) + bands[knots + 1] * beyond) * _SIZE
        rates = np.array([[curve.bits_per_snr(min(level, LAST - 1))] for level in known])
        errors = (_WIDER * 2.0 * LN2 * rates / len(band) * parts).astype(number).take(band, 1)
        rows = zip(np.square(whole), (whole * _SIZE).astype(number), errors, strict=True)
        self._at = dict(zip(known, rows, strict=True))

    @staticmethod
    @functools.lru_cache(8)
    def of(curve: Curve, shape: tuple[int, int, int], levels: tuple[int, ...], single: bool) -> Errors:
        """Those that were made before, if they were."""
        return Errors(curve, shape, levels, single=single)

    def at(self, level: int) -> tuple[NDArray[np.int64], Array, Array]:
        """By part of [-1, 1] the squares of relative sizes, in units of 1 / (ONE _GAP)^2, and these sizes themselves.

        And the mean squares (d,) by frequency.
        """
        return self._at[level]


@functools.lru_cache(8)
def _tables(residuals: Residuals, shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Sizes (knots, PARTS + 1), means by band (knots, bands), and the band of each frequency (d,)."""
    c, h, w = shape
    bands = np.array(residuals.bands, dtype=np.float64)
    rows, columns = band_of(h), band_of(w)
    band = np.arange(bands.shape[1]).reshape(c, rows[-1] + 1, columns[-1] + 1)[:, rows[:, None], columns]
    sizes = np.array([(*row, row[-1]) for row in residuals.sizes])
    return sizes, bands, band.ravel()


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
        self._x0 = x0.reshape(x.shape).astype(precision(errors.single))
        self._snr = snr_at(level)
        self._eta = _eta(x, self._snr)
        squares, sizes, self._errors = errors.at(level)
        # A value of 1 has a place of its own at the end.
        part = ((self._x0 + 1.0) * (0.5 * PARTS)).astype(np.intp)
        self._sizes = sizes.take(part)
        square = squares.take(part).sum(1, keepdims=True).astype(np.float64) * (_SIZE * _SIZE) / x.shape[1]
        self._shrunk = self._errors * square.astype(self._x0.dtype)

    def predict(self, x: Array, level: int) -> NDArray[np.float32]:
        """The prediction at a later level: (n, d) to (n, c, h, w), in [-1, 1]."""
        snr = snr_at(level)
        delta = snr - self._snr
        # In place as far as can be: what a step touches, the network's next call has to fetch again.
        news = _eta(x, snr)
        news -= self._eta
        news -= delta * self._x0
        news *= self._sizes
        gain = delta * self._shrunk
        gain += 1.0
        np.divide(self._errors, gain, out=gain)
        gain *= _transform(news, self._shape, back=False)
        moved = _transform(gain, self._shape, back=True)
        moved *= self._sizes
        moved += self._x0
        x0 = moved.astype(np.float32, copy=False)
        np.maximum(x0, -_ONE, out=x0)
        np.minimum(x0, _ONE, out=x0)
        return x0.reshape(-1, *self._shape)


def _eta(x: Array, snr: float) -> Array:
    return math.sqrt(snr * (1.0 + snr)) * x


@functools.lru_cache(8)
def _matrices(shape: tuple[int, int, int], back: bool, single: bool) -> tuple[Array, Array, Array, int, int]:
    """Of colours and rows, for multiplication from the left, and of columns, from the right.

    Also the bits of the values that they multiply, and by which power of two their product is too small: a matrix of
    single precision is divided by one that no sum of magnitudes of its rows exceeds, so that values do not grow.
    """
    made, growth = [], [0, 0, 0]
    for i, (matrix, side) in enumerate(zip(transforms(shape), shape, strict=True)):
        if single:
            growth[i] = (side - 1).bit_length() + 1 >> 1
            matrix = np.rint(matrix * 2.0**_SINGLE_BITS) * 2.0 ** -(_SINGLE_BITS + growth[i])
        made.append(np.ascontiguousarray(matrix.T if back else matrix, dtype=precision(single)))
    bits = 23 - _SINGLE_BITS - max(growth) if single else _VALUE_BITS
    return made[0], made[1], np.ascontiguousarray(made[2].T), bits, sum(growth)


def _transform(x: Array, shape: tuple[int, int, int], *, back: bool) -> Array:
    """Cosine transform of rows and columns, colours rotated; or its transpose: (n, d) to (n, d)."""
    c, h, w = shape
    colours, rows, columns, bits, growth = _matrices(shape, back, x.dtype == np.float32)
    # A power of two for each image, above all its values.
    scale = np.ldexp(x.dtype.type(1.0), bits - np.frexp(np.maximum.reduce(np.abs(x), axis=1, keepdims=True))[1])
    y = x * scale
    y = np.rint(y, out=y).reshape(-1, w) @ columns
    y = rows @ np.rint(y, out=y).reshape(-1, h, w)
    if c == 3:
        y = colours @ np.rint(y, out=y).reshape(-1, 3, h * w)
    y = y.reshape(x.shape)
    y *= x.dtype.type(1 << growth) / scale
    return y
