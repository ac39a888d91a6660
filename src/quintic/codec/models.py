"""A denoiser with its information curve: what a file needs besides itself, and how a file names it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from quintic.codec.arithmetic import UNIT
from quintic.codec.chain import First
from quintic.codec.curve import Curve
from quintic.codec.known import fingerprint
from quintic.core import CodecError, ConfigError, DataError
from quintic.diffusion import GaussianDenoiser, shipped_denoiser, shipped_names
from quintic.diffusion.denoiser import Denoiser
from quintic.diffusion.information import ErrorCurve, measure_errors
from quintic.diffusion.residuals import gaussian_residuals, measure_residuals

__all__ = ["Model", "as_model", "calibrate", "measure_curve", "name_for", "shipped_model"]

_PREFERRED = {"L": ("fashion28", "emoji32"), "RGB": ("emoji32", "fashion28")}


@dataclass(frozen=True)
class Model:
    """A denoiser and how informative its predictions are."""

    denoiser: Denoiser
    curve: Curve
    kept: dict[First, NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)
    """First predictions, for :func:`quintic.codec.chain.run_chain`."""

    @property
    def dimension(self) -> int:
        """Values of one image."""
        c, h, w = self.denoiser.shape
        return c * h * w

    def fingerprint(self, preset: int) -> bytes:
        """What a file holds; see :func:`quintic.codec.known.fingerprint`."""
        residuals = self.curve.residuals
        return fingerprint(
            preset, self.denoiser.fingerprint, self.curve.digest, residuals.digest if residuals else None
        )


def as_model(denoiser: Denoiser, curve: Curve | None = None) -> Model:
    """A denoiser with the curve that is given, or else the one that it knows itself.

    Raises:
        ConfigError: It knows none.
    """
    own = getattr(denoiser, "curve", None)
    if curve is None and isinstance(own, ErrorCurve):
        curve = Curve.from_information(own.information, own.residuals)
    elif curve is None and isinstance(denoiser, GaussianDenoiser):
        curve = Curve.from_information(denoiser.information, gaussian_residuals(denoiser))
    if curve is None:
        raise ConfigError(
            "a codec needs to know how informative this denoiser is: measure curve = quintic.codec.calibrate(denoiser, "
            "images) on images it was not trained on, and give it as Codec(denoiser, curve=curve); on the command line "
            "quintic codec model makes a file with both"
        )
    return Model(denoiser, curve)


def calibrate(denoiser: Denoiser, images: NDArray[np.float32], *, seed: int = 0, batch: int = 64) -> Curve:
    """Measure a denoiser's information curve, and what its errors look like.

    Args:
        denoiser: Any.
        images: (n, c, h, w) in [-1, 1] that it was not trained on; some hundreds.
        seed: Of the noise.
        batch: Images per call.

    Raises:
        DataError: No images, or of another shape.
    """
    errors = measure_curve(denoiser, images, seed=seed, batch=batch)
    return Curve.from_information(errors.information, errors.residuals)


def measure_curve(denoiser: Denoiser, images: NDArray[np.float32], *, seed: int = 0, batch: int = 64) -> ErrorCurve:
    """What :func:`calibrate` measures, in the form in which :class:`quintic.diffusion.NetworkDenoiser` keeps it."""
    if images.ndim != 4 or not len(images) or images.shape[1:] != denoiser.shape:
        raise DataError(f"expected images (n, {', '.join(map(str, denoiser.shape))}), found {images.shape}")
    levels = [level / UNIT for level in Curve.levels()]
    x = torch.from_numpy(np.asarray(images, dtype=np.float32))
    errors = measure_errors(denoiser, x, levels, seed=seed, batch=batch)
    return replace(errors, residuals=measure_residuals(denoiser, x, seed=seed, batch=batch))


def name_for(mode: str) -> str:
    """The shipped model for pictures of a mode.

    Raises:
        CodecError: This version of the package comes without models.
    """
    names = _PREFERRED["RGB" if mode.startswith("RGB") else "L"]
    there = [name for name in names if name in shipped_names()]
    if not there:
        raise CodecError("this version of the package comes without models; give one: Codec(denoiser)")
    return there[0]


def shipped_model(name: str) -> Model:
    """A model that comes with the package."""
    return as_model(shipped_denoiser(name))
