"""Training a diffusion model: images in, squared error of the predicted target out, a grid of samples.

Satisfies the engine's task protocol. Noise levels of a batch are stratified: one random time in each of b equal
parts of [0, 1] (Kingma et al. 2021), which makes the loss less noisy. Training noise comes from torch's generator,
which the loop seeds for every step; micro-batches draw one after another. Validation noise and levels are a pure
function of the image's number, so that two validations differ by the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quintic.core import DataError
from quintic.core.counter_rng import Stream
from quintic.core.loss import Loss
from quintic.data.images import ImageData, ImageSplit, as_pixels, as_signed, image_grid
from quintic.diffusion.config import DDPMConfig
from quintic.diffusion.network import NetworkDenoiser, make_target
from quintic.diffusion.noise_schedule import NoiseSchedule, alpha_sigma
from quintic.diffusion.samplers import ddim_sample
from quintic.diffusion.unet import UNet

__all__ = ["DDPMTask", "derived_fields", "unet_arguments"]

_EVAL_BATCH = 100
_VALIDATION_IMAGES = 2000
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def derived_fields(config: DDPMConfig, data: ImageData) -> dict[str, tuple[Any, str]]:
    """Numbers that follow from the data: {field: (value, where it comes from)}.

    Args:
        config: With 0 for what is to be found out, and ``classes`` -1.
        data: The images.

    Raises:
        DataError: Classes were asked for, and the images have none.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name, value in zip(("channels", "height", "image_width"), data.shape, strict=True):
        if not getattr(config, name):
            found[name] = (value, "the images")
    if config.classes == -1:
        if not data.class_names:
            raise DataError("ddpm.classes = -1 wants the classes of the data, but these images have no labels")
        found["classes"] = (len(data.class_names), "the images' labels")
    return found


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


class DDPMTask:
    """A U-Net and the images it learns from.

    Args:
        config: Resolved, see :func:`derived_fields`.
        data: Images of the three splits.

    Raises:
        DataError: The images are of another shape than ``config``, or lack the classes it wants.
    """

    name = "ddpm"

    def __init__(self, config: DDPMConfig, data: ImageData) -> None:
        expected = (config.channels, config.height, config.image_width)
        if data.shape != expected:
            raise DataError(f"the images are (channels, height, width) {data.shape}, the model is for {expected}")
        if config.classes > 0 and len(data.class_names) != config.classes:
            raise DataError(f"the model is for {config.classes} classes, the images have {len(data.class_names)}")
        self.config = config
        self.data = data
        self.num_examples = data.num_examples
        self.fingerprint = data.fingerprint
        self.schedule = NoiseSchedule(config.schedule, config.log_snr_min, config.log_snr_max, config.shift)

    def build(self, seed: int | None) -> UNet:
        """The model with its initial weights; None leaves them uninitialised."""
        return UNet(**unet_arguments(self.config), seed=seed)

    def denoiser(self, model: nn.Module) -> NetworkDenoiser:
        """The model behind the protocol of samplers and codec."""
        assert isinstance(model, UNet)
        return NetworkDenoiser(model, self.config.target, unet_arguments(self.config))

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits and of the model."""
        with torch.device("meta"):
            total = sum(p.numel() for p in self.build(None).parameters())
        c, h, w = self.data.shape
        splits = {name: len(getattr(self.data, name)) for name in ("train", "validation", "test")}
        lines = [f"{name:<10} {n:>9,} images of {h} x {w} pixels, {c} channels" for name, n in splits.items()]
        if self.data.flip:
            lines.append("every training image also mirrored")
        lines += [f"{name}: {note}" for name, note in self.data.notes.items()]
        lines.append(f"model: {total:,} parameters, predicts {self.config.target}")
        facts = {"images": splits, "shape": list(self.data.shape), "licence": self.data.licence}
        return lines, {"parameters_total": total, "parameters_active": total, "data": facts}

    def batch(self, examples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Training images: ``images`` (n, c, h, w) float32 in [-1, 1], and ``labels`` (n,) if classes are wanted."""
        return self._tensors(self.data.examples(examples))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Squared error of the target, summed over all values."""
        x0 = batch["images"]
        b, device = len(x0), x0.device
        times = (torch.randperm(b) + torch.rand(b)) / b
        levels = torch.tensor([self.schedule.log_snr(float(t)) for t in times], dtype=torch.float64)
        labels = batch.get("labels")
        if labels is not None:
            withheld = torch.rand(b, device=device) < self.config.class_dropout
            labels = torch.where(withheld, self.config.classes, labels)
        return self._loss(model, x0, torch.randn_like(x0), levels, labels)

    def after_step(self, model: nn.Module, progress: float) -> dict[str, Any]:
        """Nothing to do."""
        return {}

    def step_metrics(self, loss: float) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean squared error of the target on a split, at levels spread as in training; None if stopped midway.

        All images of ``test`` count, and up to 2,000 of ``validation``, evenly spaced.
        """
        chosen: ImageSplit = getattr(self.data, split)
        if not len(chosen):
            return {}  # no such split was asked for
        count = min(len(chosen), _VALIDATION_IMAGES) if split == "validation" else len(chosen)
        numbers = np.arange(count) * len(chosen) // count
        d = math.prod(self.data.shape)
        stream = Stream(0, "evaluation noise", split)
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        total, values = 0.0, 0
        try:
            for start in range(0, count, _EVAL_BATCH):
                if should_stop():
                    return None
                part = numbers[start : start + _EVAL_BATCH]
                labels = None if chosen.labels is None else chosen.labels[part]
                batch = self._tensors(ImageSplit(chosen.images[part], labels))
                noise = torch.from_numpy(stream.normal(start * d, len(part) * d)).float().view_as(batch["images"])
                times = ((np.arange(start, start + len(part)) + 0.5) * _GOLDEN) % 1.0
                levels = torch.tensor([self.schedule.log_snr(float(t)) for t in times], dtype=torch.float64)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                loss = self._loss(model, batch["images"], noise.to(device), levels, batch.get("labels"))
                total += float(loss.total)
                values += loss.count
        finally:
            model.train(was_training)
        return {f"{'val' if split == 'validation' else split}_loss": total / values}

    def sample(self, model: nn.Module, path: Path, seed: int, should_stop: Callable[[], bool]) -> str:
        """A grid of images drawn by DDIM, written to ``path.png``; a stop leaves it out."""
        if should_stop():
            return ""
        levels = self.schedule.grid(self.config.sample_steps)
        was_training = model.training
        model.eval()
        try:
            images = ddim_sample(self.denoiser(model), self.config.sample_images, levels, seed=seed)
        finally:
            model.train(was_training)
        file = path.with_name(path.name + ".png")
        image_grid(as_pixels(images.cpu().numpy())).save(file)
        return f"{self.config.sample_images} images in {file}"

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one image; backward counts as two forwards."""
        with torch.device("meta"):
            shell = self.build(None)
            x, level = torch.empty(1, *self.data.shape), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            shell(x, level)
        return 3.0 * counter.get_total_flops()

    def save_with(self, folder: Path) -> None:
        """Nothing: the configuration holds all that a later use needs."""

    def _tensors(self, split: ImageSplit) -> dict[str, Tensor]:
        tensors = {"images": torch.from_numpy(as_signed(split.images))}
        if self.config.classes:
            assert split.labels is not None
            tensors["labels"] = torch.from_numpy(split.labels)
        return tensors

    def _loss(self, model: nn.Module, x0: Tensor, noise: Tensor, levels: Tensor, labels: Tensor | None) -> Loss:
        weight = next(model.parameters())
        x0, noise = x0.to(weight.dtype), noise.to(weight.dtype)
        alpha, sigma = alpha_sigma(levels, x0)
        predicted = model(alpha * x0 + sigma * noise, levels.to(x0), labels)
        target = make_target(self.config.target, x0, noise, levels)
        return Loss(F.mse_loss(predicted.to(target), target, reduction="sum"), x0.numel())
