"""Wishes other than a known picture, each as a direction in which a prediction should move.

The score of an atom is <direction, atom>, and every rule of :mod:`quintic.codec.selection` works on it:

* to compress, the direction is x_0 minus the prediction;
* of a picture seen only as y = A x (a linear inverse problem), A^+ (y - A x_0hat): the encoder knows y alone, and the
  file holds the restored picture, restored and compressed at once;
* of a class, the gradient of log p(y | x_0hat) of any classifier of clean images (post 10711);
* without a classifier, the prediction with the class minus the one without (Ho and Salimans 2022); the chain itself
  runs without a class, so that the decoder needs none.

Values are in [-1, 1]; pictures are (height, width, channels), predictions (n, c, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quintic.codec.chain import Direction, aim, replay, run_chain
from quintic.codec.schedule import Plan
from quintic.codec.selection import Ids
from quintic.codec.symbols import random_symbols
from quintic.core import ConfigError
from quintic.core.settings import check_counts
from quintic.diffusion.denoiser import Denoiser
from quintic.diffusion.guidance import ClassConditional

__all__ = [
    "Blurred",
    "ClassConditional",
    "Greyed",
    "Masked",
    "Operator",
    "Shrunk",
    "classifier_direction",
    "classifier_free_direction",
    "generate",
    "guide",
]

Values = NDArray[np.float64]
_LUMA = np.array([0.299, 0.587, 0.114])


class Operator(Protocol):
    """An observation y = A x of a picture x."""

    shape: tuple[int, int, int]
    """(height, width, channels) of x."""

    def residual(self, x: Values) -> Values:
        """A^+ (y - A x)."""
        ...


class Masked:
    """Inpainting: some pixels are known.

    Args:
        y: (height, width, channels); what it holds elsewhere does not matter.
        known: (height, width) of bool.
    """

    def __init__(self, y: Values, known: NDArray[np.bool_]) -> None:
        if known.shape != y.shape[:2]:
            raise ConfigError(f"the mask has shape {known.shape}, the picture {y.shape[:2]}")
        self.shape = (y.shape[0], y.shape[1], y.shape[2])
        self._y, self._known = y, known[:, :, None]

    def residual(self, x: Values) -> Values:
        """Zero where nothing is known."""
        return np.where(self._known, self._y - x, 0.0)


class Shrunk:
    """Super-resolution: means of factor x factor pixels are known.

    Args:
        y: (height, width, channels) of the small picture.
        factor: At least 2.
    """

    def __init__(self, y: Values, factor: int) -> None:
        if factor < 2:
            raise ConfigError(f"super-resolution needs a factor of at least 2, found {factor}")
        self.shape = (y.shape[0] * factor, y.shape[1] * factor, y.shape[2])
        self._y, self._factor = y, factor

    def residual(self, x: Values) -> Values:
        """The same for every pixel of a block."""
        f, (h, w, c) = self._factor, self._y.shape
        means = x.reshape(h, f, w, f, c).mean((1, 3))
        return (self._y - means).repeat(f, axis=0).repeat(f, axis=1)


class Greyed:
    """Colourisation: luma is known.

    Args:
        y: (height, width, 1).
    """

    def __init__(self, y: Values) -> None:
        if y.shape[2] != 1:
            raise ConfigError(f"colourisation starts from a grey picture, found {y.shape[2]} channels")
        self.shape: tuple[int, int, int] = (y.shape[0], y.shape[1], 3)
        self._y = y

    def residual(self, x: Values) -> Values:
        """Along the weights of luma."""
        return (self._y - (x @ _LUMA)[:, :, None]) * (_LUMA / (_LUMA @ _LUMA))


class Blurred:
    """Deblurring: a Gaussian blur is known.

    Args:
        y: (height, width, channels).
        sigma: Of the blur, in pixels.
        noise: Standard deviation of what else y holds, rounding at least; it keeps the inverse tame.
    """

    def __init__(self, y: Values, sigma: float, noise: float = 0.01) -> None:
        if not (0 < sigma < np.inf and 0 < noise < np.inf):
            raise ConfigError(f"sigma and noise of a blur must be positive numbers, found {sigma} and {noise}")
        self.shape = (y.shape[0], y.shape[1], y.shape[2])
        self._y = y
        self._down, self._across = blur_matrix(y.shape[0], sigma), blur_matrix(y.shape[1], sigma)
        self._u, s, self._vt = np.linalg.svd(self._down)
        self._p, t, self._qt = np.linalg.svd(self._across)
        gain = s[:, None] * t
        self._inverse = (gain / (gain**2 + noise**2))[:, :, None]

    def residual(self, x: Values) -> Values:
        """By the regularised inverse of both axes."""
        rest = self._y - np.einsum("ij,jkc,lk->ilc", self._down, x, self._across)
        inside = np.einsum("ji,jkc,kl->ilc", self._u, rest, self._p) * self._inverse
        return np.einsum("ji,jkc,kl->ilc", self._vt, inside, self._qt)


def blur_matrix(length: int, sigma: float) -> Values:
    """(length, length) of a Gaussian blur whose rows add up to 1."""
    place = np.arange(length)
    weights = np.exp(-0.5 * np.square((place[:, None] - place) / sigma))
    return weights / weights.sum(1, keepdims=True)


def classifier_direction(log_prob: Callable[[Tensor], Tensor], scale: float = 1.0) -> Direction:
    """Towards what a classifier finds likely.

    Args:
        log_prob: Clean images (n, c, h, w) to log p of the wanted class (n,), differentiable.
        scale: Of the gradient; without effect on argmax.
    """

    def direction(x0: NDArray[np.float32], x: NDArray[np.float32], log_snr: float) -> NDArray[np.float32]:
        with torch.enable_grad():
            leaf = torch.from_numpy(x0).clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(log_prob(leaf).sum(), leaf)
        return np.float32(scale) * gradient.numpy()

    return direction


def classifier_free_direction(denoiser: ClassConditional, label: int, scale: float = 1.0) -> Direction:
    """Towards what the model itself would predict, were it told the class."""

    def direction(x0: NDArray[np.float32], x: NDArray[np.float32], log_snr: float) -> NDArray[np.float32]:
        told = denoiser.predict_x0(torch.from_numpy(x), log_snr, torch.full((len(x),), label))
        return np.float32(scale) * (told.numpy() - x0)

    return direction


def generate(
    denoiser: Denoiser, plan: Plan, count: int, seed: int = 0, *, batch: int = 1
) -> tuple[list[Ids], NDArray[np.float32]]:
    """Images from random codes.

    Args:
        denoiser: The model.
        plan: Any.
        count: Images.
        seed: Of the codes.
        batch: Images per call, as for :func:`quintic.codec.chain.run_chain`.

    Returns:
        Symbols of each step, and images (count, c, h, w) in [-1, 1].

    Raises:
        ConfigError: ``count`` or ``batch`` is less than 1.
    """
    check_counts(count=count, batch=batch)
    c, h, w = denoiser.shape
    codes = random_symbols(plan, count, c * h * w, seed)
    return codes, run_chain(denoiser, plan, count, replay(plan, codes), batch=batch)


def guide(
    denoiser: Denoiser, plan: Plan, count: int, direction: Direction, *, draw: str = "softmax", seed: int = 0
) -> tuple[list[Ids], NDArray[np.float32]]:
    """Images whose codes follow a direction.

    Args:
        denoiser: The model.
        plan: With rule single for draws other than argmax; argmax makes ``count`` times the same image.
        count: Images.
        direction: Where to.
        draw: argmax, softmax or literal.
        seed: Of the draws.

    Returns:
        As :func:`generate`.

    Raises:
        ConfigError: ``count`` is less than 1, or a draw that the plan does not allow.
    """
    check_counts(count=count)
    codes: list[Ids] = []
    images = run_chain(denoiser, plan, count, aim(plan, direction, codes, draw=draw, seed=seed))
    return codes, images
