"""A denoiser that is told the class of each image, and guided towards it.

    x_0 = E[x_0 | x, y] + w (E[x_0 | x, y] - E[x_0 | x])

is classifier-free guidance (Ho and Salimans 2022) with weight w; 0 is the model told its class and no more. It takes
two calls of the network instead of one.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.diffusion.denoiser import Denoiser

__all__ = ["ClassConditional", "check_labels", "told"]


class ClassConditional(Denoiser, Protocol):
    """A denoiser that can be told a class."""

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0 without."""
        ...

    def predict_x0(self, x: Tensor, log_snr: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """With labels (b,), or without a class."""
        ...


def told(denoiser: Denoiser, count: int, labels: Tensor | int | None, guidance: float = 0.0) -> Denoiser:
    """The denoiser of ``count`` images whose classes are known; itself if none are.

    Args:
        denoiser: Any, of :class:`ClassConditional` if there are labels.
        count: Images of every call.
        labels: Class, or (count,) classes; -1 is "no class", for models that have been trained without as well.
        guidance: Weight w.

    Raises:
        ConfigError: Labels for a denoiser without classes, of another number or out of range, or a weight that is
            negative, infinite, or has no class to go to.
    """
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ConfigError(f"the guidance weight must be 0 or more, found {guidance}")
    if labels is None:
        if guidance:
            raise ConfigError("guidance needs classes to go to: labels=")
        return denoiser
    if not (classes := getattr(denoiser, "num_classes", 0)):
        raise ConfigError("labels were given to a denoiser without classes; leave them out")
    rows = torch.as_tensor(labels, device="cpu")
    if rows.is_floating_point() or rows.dtype == torch.bool or rows.shape not in ((), (count,)):
        raise ConfigError(f"expected {count} whole numbers as labels, found {tuple(rows.shape)} of {rows.dtype}")
    rows = rows.long().expand(count)
    check_labels(rows, classes, least=-1)
    return _Told(denoiser, rows, guidance)  # type: ignore[arg-type]


def check_labels(labels: Tensor, classes: int, least: int = 0) -> None:
    """Refuse labels out of range.

    Raises:
        ConfigError: One is below ``least`` or not below ``classes``.
    """
    low, high = (int(v) for v in labels.aminmax()) if len(labels) else (0, 0)
    if low < least or high >= classes:
        none = ", or -1 for none" if least < 0 else ""
        raise ConfigError(f"labels are 0 to {classes - 1}{none}; found {low} to {high}")


class _Told:
    """See :func:`told`."""

    def __init__(self, denoiser: ClassConditional, labels: Tensor, guidance: float) -> None:
        self._denoiser, self._labels, self._guidance = denoiser, labels, guidance

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self._denoiser.shape

    @property
    def fingerprint(self) -> str:
        """Of the denoiser."""
        return self._denoiser.fingerprint

    def predict_x0(self, x: Tensor, log_snr: float | Tensor) -> Tensor:
        """The guided prediction."""
        towards = self._denoiser.predict_x0(x, log_snr, self._labels.to(x.device))
        if not self._guidance:
            return towards
        return torch.lerp(self._denoiser.predict_x0(x, log_snr), towards, 1.0 + self._guidance)
