"""What samplers and the codec need of a model: the mean of the image given a noisy one.

    E[x_0 | x],   x = alpha x_0 + sigma eps,   alpha^2 + sigma^2 = 1,   log_snr = log(alpha^2 / sigma^2)

A network approximates it (:mod:`quintic.diffusion.unet`). For Gaussian images N(m, V L V^T) it is known exactly:

    E[x_0 | x] = m + V diag(alpha l / (alpha^2 l + sigma^2)) V^T (x - alpha m)

and so are its mean squared error, sum l sigma^2 / (alpha^2 l + sigma^2), and the information in x about x_0,
1/2 sum log(1 + exp(log_snr) l). ``GaussianDenoiser`` is that: a model without training, and the truth for tests.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quintic.core import CheckpointError, ConfigError, DataError
from quintic.core.files import atomic_write
from quintic.diffusion.noise_schedule import alpha_sigma

__all__ = ["Denoiser", "GaussianDenoiser", "check_noisy", "tensors_fingerprint"]

_ROUNDING = (2.0 / 255.0) ** 2 / 12.0
"""Variance of rounding to 8 bits, in units of the range [-1, 1]; no pixel is surer than that."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the clean image from a noisy one. Nothing else in this package knows what is inside."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of whatever the prediction depends on: weights and configuration."""
        ...

    def predict_x0(self, x: Tensor, log_snr: float | Tensor) -> Tensor:
        """The expected clean image.

        Args:
            x: (b, c, h, w) float32, alpha x_0 + sigma eps with x_0 in [-1, 1].
            log_snr: Of all images, or (b,), one each.

        Returns:
            (b, c, h, w) float32, not clipped.
        """
        ...


def check_noisy(x: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse a batch of the wrong shape.

    Raises:
        ConfigError: ``x`` is not (b, *shape).
    """
    if tuple(x.shape[1:]) != tuple(shape):
        raise ConfigError(f"expected images of shape (b, {', '.join(map(str, shape))}), found {tuple(x.shape)}")


def tensors_fingerprint(tensors: dict[str, Tensor], config: str = "") -> str:
    """SHA-256 of named tensors and a description, whatever order they come in."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class GaussianDenoiser:
    """The exact denoiser of Gaussian images.

    Args:
        mean: (c, h, w).
        basis: (d, r) orthonormal columns, d = c h w.
        variances: (r,) along them.
        rest: Variance along everything else; without effect if r = d.

    Raises:
        ConfigError: Shapes that do not fit, or a variance that is not positive.

    Example:
        >>> flat = GaussianDenoiser(torch.zeros(1, 1, 2), torch.eye(2), torch.tensor([1.0, 3.0]))
        >>> flat.predict_x0(torch.ones(1, 1, 1, 2), log_snr=0.0).round(decimals=4)
        tensor([[[[0.7071, 1.0607]]]])
    """

    def __init__(self, mean: Tensor, basis: Tensor, variances: Tensor, rest: float = _ROUNDING) -> None:
        if mean.ndim != 3 or basis.shape != (mean.numel(), len(variances)) or variances.ndim != 1:
            raise ConfigError(
                "a Gaussian denoiser needs a mean (c, h, w), a basis (c h w, r) and variances (r,), "
                f"found {tuple(mean.shape)}, {tuple(basis.shape)} and {tuple(variances.shape)}"
            )
        if rest <= 0 or not bool((variances > 0).all()):
            raise ConfigError("the variances of a Gaussian denoiser must be positive")
        c, h, w = mean.shape
        self._shape = (c, h, w)
        # On the CPU, as not every device has float64; predictions are made where the images are.
        self._mean = mean.cpu().float().contiguous()
        self._basis = basis.cpu().float().contiguous()
        self._variances = variances.cpu().double().contiguous()
        self._rest = float(rest)
        self._fingerprint = tensors_fingerprint(self._tensors(), "gaussian")

    @classmethod
    def fit(cls, images: Tensor, rank: int | None = None) -> GaussianDenoiser:
        """Mean and principal components of images.

        Args:
            images: (n, c, h, w) in [-1, 1], n >= 2.
            rank: Components that are kept; the others share their mean variance. None keeps all of them.

        Raises:
            DataError: Too few images.
            ConfigError: ``rank`` is outside [1, c h w].
        """
        if images.ndim != 4 or len(images) < 2:
            raise DataError(f"expected at least 2 images as a tensor (n, c, h, w), found {tuple(images.shape)}")
        flat = images.flatten(1).cpu().double()
        n, d = flat.shape
        if rank is not None and not 1 <= rank <= d:
            raise ConfigError(f"rank must be between 1 and {d}, the values of an image, found {rank}")
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / (n - 1))
        values, vectors = values.flip(0).clamp_min(0.0) + _ROUNDING, vectors.flip(1)
        # The sign of an eigenvector is arbitrary: its largest entry is made positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * largest.sign()
        r = d if rank is None else rank
        rest = float(values[r:].mean()) if r < d else _ROUNDING
        return cls(mean.view(images.shape[1:]), vectors[:, :r], values[:r], rest)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self._shape

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of mean, basis and variances."""
        return self._fingerprint

    @property
    def basis(self) -> Tensor:
        """(c h w, r) directions of the first r variances of ``spectrum``."""
        return self._basis

    @property
    def spectrum(self) -> Tensor:
        """(c h w,) float64 variances along all directions, those of ``rest`` last."""
        others = math.prod(self._shape) - len(self._variances)
        return torch.cat([self._variances, self._variances.new_full((others,), self._rest)])

    def predict_x0(self, x: Tensor, log_snr: float | Tensor) -> Tensor:
        """The posterior mean; see :class:`Denoiser`.

        Raises:
            ConfigError: ``x`` is not a batch of images of this shape.
        """
        check_noisy(x, self._shape)
        device = x.device
        level = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu").reshape(-1, 1)
        alpha, sigma = alpha_sigma(level)
        gain = alpha * self._variances / (alpha**2 * self._variances + sigma**2)
        gain_rest = alpha * self._rest / (alpha**2 * self._rest + sigma**2)
        mean, basis = self._mean.flatten().to(device), self._basis.to(device)
        centred = x.flatten(1).float() - alpha.float().to(device) * mean
        along = centred @ basis
        if len(self._variances) == len(mean):
            moved = (along * gain.float().to(device)) @ basis.T
        else:
            moved = (along * (gain - gain_rest).float().to(device)) @ basis.T + centred * gain_rest.float().to(device)
        return (mean + moved).view(x.shape)

    def mmse(self, log_snr: float) -> float:
        """Mean squared error of the prediction per value, if images are as this model says."""
        alpha, sigma = alpha_sigma(log_snr)
        spectrum = self.spectrum
        return float((spectrum * sigma**2 / (alpha**2 * spectrum + sigma**2)).mean())

    def information(self, log_snr: float) -> float:
        """Information of a noisy image about the clean one, in nats per image."""
        return float(0.5 * torch.log1p(math.exp(log_snr) * self.spectrum).sum())

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        atomic_write(path, save(self._tensors(), metadata={"kind": "gaussian"}))

    @classmethod
    def load(cls, path: Path) -> GaussianDenoiser:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: The file is missing or holds something else.
        """
        try:
            tensors = load_file(path)
            return cls(tensors["mean"], tensors["basis"], tensors["variances"], float(tensors["rest"]))
        except (OSError, SafetensorError, KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} is not a file of a Gaussian denoiser: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        rest = torch.tensor(self._rest, dtype=torch.float64, device="cpu")
        return {"mean": self._mean, "basis": self._basis, "variances": self._variances, "rest": rest}
