"""What a prediction's error looks like: how large it is by the predicted value, and how much of it lies in which bands.

The error r = x_0 - E[x_0 | x] of a network is far from white. It is small where the prediction is black or white, and
most of it is smooth, the more so the more noise there was. Two small tables per noise level say so,

    covariance of r  ~  e S D^T B D S,

with e its mean square, S diagonal, the relative size at each pixel as a function of the value predicted there, D the
cosine transform of rows and columns (of colours first a rotation to brightness and two differences), and B diagonal,
the relative mean square in each band of frequencies. The codec moves predictions by it between calls of a network.

Tables are whole numbers of 1/256, and matrices of the transform whole numbers of 2^-20, so that all that follows from
them can be computed alike everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quintic.core import ConfigError, DataError
from quintic.core.settings import check_counts
from quintic.diffusion.denoiser import Denoiser, GaussianDenoiser
from quintic.diffusion.noise_schedule import alpha_sigma
from quintic.diffusion.samplers import seeded_noise

__all__ = [
    "KNOTS",
    "ONE",
    "PARTS",
    "Residuals",
    "band_of",
    "gaussian_residuals",
    "measure_residuals",
    "part_of",
    "to_bands",
    "transforms",
]

Array = NDArray[np.float64]

KNOTS = (-8, -4, 0, 4, 8)
"""log_snr of the tables."""
PARTS = 21
"""Equal parts of [-1, 1], one for each size."""
ONE = 256
"""What stands for 1 in the tables."""
_MATRIX_BITS = 20
_PRIOR = 20.0  # a part of [-1, 1] where hardly any prediction lies tends to the size of all


@dataclass(frozen=True)
class Residuals:
    """The two tables of each level.

    Raises:
        ConfigError: Tables of wrong lengths, or numbers that are not positive.
    """

    sizes: tuple[tuple[int, ...], ...]
    """At each of KNOTS, for each of PARTS: root mean square of the error there, relative to that of all."""
    bands: tuple[tuple[int, ...], ...]
    """At each of KNOTS, for each channel, band of rows and band of columns: relative mean square, S taken out."""

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.bands}
        if len(self.sizes) != len(KNOTS) or len(self.bands) != len(KNOTS) or len(lengths) != 1:
            raise ConfigError(f"residuals have tables for {len(KNOTS)} noise levels")
        if any(len(row) != PARTS for row in self.sizes):
            raise ConfigError(f"residuals have sizes for {PARTS} parts of [-1, 1]")
        if any(not 1 <= n < 1 << 24 for row in (*self.sizes, *self.bands) for n in row):
            raise ConfigError("residuals are positive whole numbers below 2^24")

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256."""
        numbers = itertools.chain(*self.sizes, *self.bands)
        return hashlib.sha256(",".join(map(str, numbers)).encode()).hexdigest()

    @classmethod
    def from_squares(cls, sizes: Sequence[Array], squares: Sequence[Array]) -> Residuals:
        """From relative sizes (PARTS,) and mean squares by frequency (c, h, w) at each of KNOTS."""
        return cls(
            tuple(tuple(_whole(row)) for row in sizes),
            tuple(tuple(_whole(to_bands(table).ravel())) for table in squares),
        )


@functools.cache
def transforms(shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Orthogonal matrices of channels, rows and columns, to 2^-20."""
    c, h, w = shape
    colours = np.eye(c)
    if c == 3:
        colours = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        colours /= np.sqrt(np.square(colours).sum(1, keepdims=True))
    return _rounded(colours), _rounded(_cosines(h)), _rounded(_cosines(w))


def band_of(side: int) -> NDArray[np.int64]:
    """Band of each frequency along a side: they begin at 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on.

    Example:
        >>> band_of(10).tolist()
        [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
    """
    starts = [0, 1, *(start for k in range(1, 20) for start in (1 << k, 3 << (k - 1)))]
    return np.searchsorted(starts, np.arange(side), side="right") - 1


def part_of(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Which of PARTS values of [-1, 1] lie in."""
    return np.minimum((values.astype(np.float64) + 1.0) * (0.5 * PARTS), PARTS - 1).astype(np.int64)


def to_bands(squares: Array) -> Array:
    """(c, h, w) by frequency to means (c, bands of rows, bands of columns)."""
    rows, columns = (np.eye(int(band_of(side)[-1]) + 1)[:, band_of(side)] for side in squares.shape[1:])
    return rows @ squares @ columns.T / np.outer(rows.sum(1), columns.sum(1))


@torch.no_grad()
def measure_residuals(denoiser: Denoiser, images: Tensor, *, seed: int = 0, batch: int = 100) -> Residuals:
    """Measure a denoiser's residuals.

    Args:
        denoiser: Any.
        images: (n, c, h, w) in [-1, 1] that it was not trained on.
        seed: Of the noise.
        batch: Images per call.

    Raises:
        ConfigError: ``batch`` is less than 1.
        DataError: No images.
    """
    check_counts(batch=batch)
    if not len(images):
        raise DataError("the residuals of a denoiser are measured on one image or more, found none")
    colours, rows, columns = transforms(denoiser.shape)
    sizes, squares = [], []
    batches = [images[start : start + batch].float() for start in range(0, len(images), batch)]
    # The same at every level, and slower to draw than a small denoiser is to call.
    noises = [seeded_noise(seed, len(x0), denoiser.shape, first=i * batch)(0).to(x0) for i, x0 in enumerate(batches)]
    for level in KNOTS:
        predicted, errors = [], []
        for x0, noise in zip(batches, noises, strict=True):
            alpha, sigma = alpha_sigma(level, x0)
            predicted.append(denoiser.predict_x0(alpha * x0 + sigma * noise, level).clamp(-1.0, 1.0))
            errors.append(x0 - predicted[-1])
        part = part_of(torch.cat(predicted).cpu().numpy())
        r = torch.cat(errors).cpu().double().numpy()
        r /= math.sqrt(max(float(np.square(r).mean()), 1e-12))
        total = np.bincount(part.ravel(), np.square(r).ravel(), PARTS) + _PRIOR
        sizes.append(np.sqrt(total / (np.bincount(part.ravel(), minlength=PARTS) + _PRIOR)))
        seen = rows @ (r / sizes[-1][part]) @ columns.T
        squares.append(np.square(np.einsum("ij,njhw->nihw", colours, seen)).mean(0))
    return Residuals.from_squares(sizes, squares)


def gaussian_residuals(denoiser: GaussianDenoiser) -> Residuals:
    """Those of a Gaussian, whose errors do not depend on what is predicted."""
    c, h, w = denoiser.shape
    colours, rows, columns = transforms(denoiser.shape)
    basis = denoiser.basis.double().numpy().reshape(c, h, w, -1)
    seen = np.einsum("ic,yh,xw,chwk->iyxk", colours, rows, columns, basis, optimize=True)
    share = np.square(seen)
    spectrum, kept = denoiser.spectrum.numpy(), share.shape[-1]
    squares = []
    for level in KNOTS:
        errors = spectrum / (1.0 + math.exp(level) * spectrum)
        table = share @ errors[:kept]
        if kept < len(spectrum):
            table += errors[-1] * (1.0 - share.sum(-1))
        squares.append(table / errors.mean())
    return Residuals.from_squares([np.ones(PARTS)] * len(KNOTS), squares)


def _whole(values: Array) -> list[int]:
    return [max(1, int(n)) for n in np.rint(values * ONE)]


def _rounded(matrix: Array) -> Array:
    return np.rint(matrix * 2.0**_MATRIX_BITS) * 2.0**-_MATRIX_BITS


def _cosines(side: int) -> Array:
    """The orthogonal cosine transform (DCT-II), frequencies as rows."""
    at = math.pi / side * np.outer(np.arange(side), np.arange(side) + 0.5)
    matrix = np.cos(at) * math.sqrt(2.0 / side)
    matrix[0] = math.sqrt(1.0 / side)
    return matrix
