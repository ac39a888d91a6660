"""Training a diffusion model: images in, squared error of the predicted target out, a grid of samples.

Satisfies the engine's task protocol. Noise levels of a batch are stratified: one random time in each of b equal
parts of [0, 1] (Kingma et al. 2021), which makes the loss less noisy. Training noise comes from torch's generator,
which the loop seeds for every step; micro-batches draw one after another. Validation noise and levels are a pure
function of the image's number, so that two validations differ by the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quintic.core.counter_rng import Stream
from quintic.core.loss import Loss
from quintic.data.image_task import ImageTask, image_fields
from quintic.data.images import ImageData, as_signed
from quintic.diffusion.config import DDPMConfig
from quintic.diffusion.network import NetworkDenoiser, make_target
from quintic.diffusion.noise_schedule import NoiseSchedule, alpha_sigma
from quintic.diffusion.samplers import ddim_sample
from quintic.diffusion.unet import UNet

__all__ = ["DDPMTask", "derived_fields", "unet_arguments"]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def derived_fields(config: DDPMConfig, data: ImageData) -> dict[str, tuple[Any, str]]:
    """Numbers that follow from the data, see :func:`quintic.data.image_task.image_fields`."""
    return image_fields("ddpm", config, data)


def unet_arguments(config: DDPMConfig) -> dict[str, Any]:
    """Keywords of :class:`UNet`, but for the seed."""
    return {
        "shape": (config.channels, config.height, config.image_width),
        "width": config.width,
        "levels": config.levels,
        "blocks": config.blocks,
        "patch": config.patch,
        "heads": config.heads,
        "num_classes": config.classes,
        "dropout": config.dropout,
    }


class DDPMTask(ImageTask):
    """A U-Net and the images it learns from.

    Args:
        config: Resolved, see :func:`derived_fields`.
        data: Images of the three splits.

    Raises:
        DataError: The images are of another shape than ``config``, or lack the classes it wants.
    """

    name = "ddpm"
    samples_whole = False

    def __init__(self, config: DDPMConfig, data: ImageData) -> None:
        super().__init__(config, data)
        self.config = config
        self.schedule = NoiseSchedule(config.schedule, config.log_snr_min, config.log_snr_max, config.shift)

    def build(self, seed: int | None = None, *, initialize: bool = True) -> UNet:
        """The model; arguments as of its constructor."""
        return UNet(**unet_arguments(self.config), seed=seed, initialize=initialize)

    def denoiser(self, model: nn.Module) -> NetworkDenoiser:
        """The model behind the protocol of samplers and codec."""
        assert isinstance(model, UNet)
        return NetworkDenoiser(model, self.config.target, unet_arguments(self.config))

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits and of the model."""
        with torch.device("meta"):
            total = sum(p.numel() for p in self.build(initialize=False).parameters())
        lines, facts = self.describe_images()
        lines.append(f"model: {total:,} parameters, predicts {self.config.target}")
        return lines, {"parameters_total": total, "parameters_active": total, "data": facts}

    def pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """In [-1, 1], float32."""
        return torch.from_numpy(as_signed(images))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Squared error of the target, summed over all values."""
        x0 = batch["images"]
        b, device = len(x0), x0.device
        times = (torch.randperm(b, device="cpu") + torch.rand(b, device="cpu")) / b
        levels = torch.tensor([self.schedule.log_snr(float(t)) for t in times], dtype=torch.float64, device="cpu")
        labels = batch.get("labels")
        if labels is not None:
            withheld = torch.rand(b, device=device) < self.config.class_dropout
            labels = torch.where(withheld, self.config.classes, labels)
        return self._loss(model, x0, torch.randn_like(x0), levels, labels)

    def evaluation_loss(self, model: nn.Module, batch: dict[str, Tensor], noise: Stream, first: int) -> Loss:
        """Squared error with fixed noise, at levels spread as in training."""
        x0 = batch["images"]
        times = ((np.arange(first, first + len(x0)) + 0.5) * _GOLDEN) % 1.0
        levels = torch.tensor([self.schedule.log_snr(float(t)) for t in times], dtype=torch.float64, device="cpu")
        drawn = self.noise(noise.normal, x0, first).to(x0)
        return self._loss(model, x0, drawn, levels, batch.get("labels"))

    def draw(self, model: nn.Module, seed: int, check: Callable[[], None]) -> Tensor:
        """Images by DDIM."""
        levels = self.schedule.grid(self.config.sample_steps)
        was_training = model.training
        model.eval()
        try:
            return ddim_sample(self.denoiser(model), self.config.sample_images, levels, seed=seed, check=check)
        finally:
            model.train(was_training)

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one image; backward counts as two forwards."""
        with torch.device("meta"):
            shell = self.build(initialize=False)
            x, level = torch.empty(1, *self.data.shape), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            shell(x, level)
        return 3.0 * counter.get_total_flops()

    def _loss(self, model: nn.Module, x0: Tensor, noise: Tensor, levels: Tensor, labels: Tensor | None) -> Loss:
        weight = next(model.parameters())
        x0, noise = x0.to(weight.dtype), noise.to(weight.dtype)
        alpha, sigma = alpha_sigma(levels, x0)
        predicted = model(alpha * x0 + sigma * noise, levels.to(x0), labels)
        target = make_target(self.config.target, x0, noise, levels)
        return Loss(F.mse_loss(predicted.to(target), target, reduction="sum"), x0.numel())
