"""Settings of a diffusion model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quintic.core import ConfigError
from quintic.core.settings import check_least, check_names, check_types

__all__ = ["DDPMConfig"]


@dataclass(frozen=True)
class DDPMConfig:
    """A U-Net and what it learns.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    channels: int = 0
    """Of the images; 0 follows the data."""
    height: int = 0
    """Of the images; 0 follows the data."""
    image_width: int = 0
    """Of the images; 0 follows the data."""
    classes: int = 0
    """Classes to condition on; -1 follows the data, 0 is without."""
    class_dropout: float = 0.1
    """Share of training images whose class is withheld, so that the model also works without one."""
    width: int = 48
    """Channels of the finest level; each coarser one has twice as many."""
    levels: int = 2
    """Resolutions."""
    blocks: int = 2
    """Residual blocks per level, down and up each."""
    patch: int = 2
    """Pixels along each side that become channels first."""
    heads: int = 4
    """Of the attention at the coarsest level; 0 leaves it out."""
    dropout: float = 0.0
    """Share of values in residual blocks zeroed while training."""
    target: str = "v"
    """What the network predicts: v, eps or x0."""
    schedule: str = "cosine"
    """How often each noise level is trained: cosine, linear or log-snr, at random times."""
    shift: float = 0.0
    """Added to the schedule's log_snr: positive trains more on little noise."""
    log_snr_min: float = -9.0
    """Noisiest level."""
    log_snr_max: float = 10.0
    """Cleanest level."""
    sample_images: int = 36
    """Images in a sample."""
    sample_steps: int = 40
    """Calls of the network that make one."""

    def __post_init__(self) -> None:
        check_types("ddpm", self)
        # Written out here, so that reading settings does not import torch.
        check_names("ddpm", self, {"target": ("v", "eps", "x0"), "schedule": ("cosine", "linear", "log-snr")})
        check_least("ddpm", self, {
            "channels": 0, "height": 0, "image_width": 0, "classes": -1, "width": 8, "levels": 1, "blocks": 1,
            "patch": 1, "heads": 0, "sample_images": 1, "sample_steps": 2,
        })  # fmt: skip
        for name in ("shift", "log_snr_min", "log_snr_max"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"ddpm.{name} must be finite, found {getattr(self, name)}")
        for name in ("class_dropout", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"ddpm.{name} must be in [0, 1), found {getattr(self, name)}")
        if not self.log_snr_min < self.log_snr_max:
            raise ConfigError(
                f"ddpm.log_snr_min must be below ddpm.log_snr_max, found {self.log_snr_min} and {self.log_snr_max}"
            )
