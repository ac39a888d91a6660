"""Foreign models that know a thousand numbered steps, seen as denoisers of any noise level.

Such a model was trained at steps t = 0 ... T-1 with abar_t = prod (1 - beta). A noise level that lies between two of
them is given a fractional step, linear in log_snr; their sinusoidal embeddings take any number. Levels beyond the
ends are given the end. Twice as many output channels as input channels mean a learned variance behind the prediction;
it is not used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quintic.core import CheckpointError, ConfigError, suggest
from quintic.diffusion.denoiser import check_noisy
from quintic.diffusion.guidance import check_labels
from quintic.diffusion.network import TARGETS, x0_from_target

__all__ = ["Predictor", "StepwiseDenoiser"]

Predictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (b, c, h, w), step (b,) float, labels (b,) or None) -> (b, c or 2 c, h, w)."""


class StepwiseDenoiser:
    """A network of numbered steps behind the protocol :class:`quintic.diffusion.Denoiser`.

    Args:
        predict: The network.
        abar: (T,) falling products of 1 - beta.
        target: eps, x0 or v.
        shape: (c, h, w).
        fingerprint: Of weights and settings.
        num_classes: Of a network that cannot do without a class; 0 for one that knows none.

    Raises:
        ConfigError: Unknown target.
        CheckpointError: ``abar`` does not fall within (0, 1).
    """

    def __init__(
        self,
        predict: Predictor,
        abar: NDArray[np.float64],
        target: str,
        shape: tuple[int, int, int],
        fingerprint: str,
        num_classes: int = 0,
    ) -> None:
        if target not in TARGETS:
            raise ConfigError(f"unknown target {target!r}{suggest(target, TARGETS)}")
        # A last step of pure noise (abar 0) is allowed: its log_snr is cut.
        kept = np.clip(np.asarray(abar, dtype=np.float64), 1e-12, 1.0 - 1e-12)
        if kept.ndim != 1 or len(kept) < 2 or not (np.diff(kept) < 0).all():
            raise CheckpointError("the products of 1 - beta must fall from step to step; is this a noise schedule?")
        self._log_snr = np.log(kept) - np.log1p(-kept)
        self._predict = predict
        self.target = target
        self.num_classes = num_classes
        self._shape = shape
        self._fingerprint = fingerprint

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self._shape

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and settings."""
        return self._fingerprint

    @property
    def log_snr(self) -> list[float]:
        """The levels the model was trained at, from noise to image."""
        return self._log_snr[::-1].tolist()

    def step(self, log_snr: float | Tensor) -> Tensor:
        """Fractional step of a noise level, float64."""
        level = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu").numpy()
        steps = np.arange(len(self._log_snr), dtype=np.float64)
        return torch.as_tensor(np.interp(level, self._log_snr[::-1], steps[::-1]), device="cpu")

    @torch.no_grad()
    def predict_x0(self, x: Tensor, log_snr: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The expected clean image; see :class:`quintic.diffusion.Denoiser`.

        Raises:
            ConfigError: Another shape, or labels that are missing, out of range or not wanted.
        """
        check_noisy(x, self._shape)
        if (labels is None) != (self.num_classes == 0):
            wanted = f"labels of {self.num_classes} classes" if self.num_classes else "no labels"
            raise ConfigError(f"this model wants {wanted}, found {'none' if labels is None else 'some'}")
        if labels is not None:
            check_labels(labels, self.num_classes)
        level = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu").expand(len(x))
        predicted = self._predict(x, self.step(level).to(x), labels)[:, : x.shape[1]]
        return x0_from_target(self.target, x, predicted, level)
