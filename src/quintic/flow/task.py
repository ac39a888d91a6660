"""Training a TARFLOW: images in, negative log-density out, a grid of samples.

Satisfies the engine's task protocol. The loss is -log p(x) per number of an image, in nats, of pixels from -1 to 1, all
constants included. With ``noise = "gaussian"`` x is the image plus noise of size sigma, and the flow learns the density
of noisy images, to be denoised after sampling. With ``noise = "uniform"`` x is dequantised, and

    bits per dimension = (loss + log 128) / log 2

bounds the code length of the image itself. Training noise comes from torch's generator, which the loop seeds. That of
validation is a pure function of the image's number, so that two validations differ by the weights alone.
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

from quintic.core import ConfigError, DataError
from quintic.core.counter_rng import Stream
from quintic.core.loss import Loss
from quintic.data.images import ImageData, ImageSplit, as_pixels, image_grid
from quintic.flow.block import Linear
from quintic.flow.config import TarFlowConfig
from quintic.flow.guidance import Guidance
from quintic.flow.likelihood import dequantise
from quintic.flow.patches import check_patch
from quintic.flow.tarflow import TarFlow

__all__ = ["TarFlowTask", "derived_fields", "flow_arguments"]

_EVAL_BATCH = 100
_VALIDATION_IMAGES = 2000
_LEVELS = 256


def derived_fields(config: TarFlowConfig, data: ImageData) -> dict[str, tuple[Any, str]]:
    """Numbers that follow from the data: {field: (value, where it comes from)}.

    Args:
        config: With 0 for what is to be found out, and ``classes`` -1.
        data: The images.

    Raises:
        DataError: Classes were asked for, and the images have none.
        ConfigError: The patch does not divide the images.
    """
    found: dict[str, tuple[Any, str]] = {}
    shape = []
    for name, value in zip(("channels", "height", "image_width"), data.shape, strict=True):
        if not getattr(config, name):
            found[name] = (value, "the images")
        shape.append(getattr(config, name) or value)
    if config.classes == -1:
        if not data.class_names:
            raise DataError("tarflow.classes = -1 wants the classes of the data, but these images have no labels")
        found["classes"] = (len(data.class_names), "the images' labels")
    try:
        check_patch((shape[0], shape[1], shape[2]), config.patch)
    except ConfigError as error:
        raise ConfigError(f"tarflow.patch: {error}") from None
    return found


def flow_arguments(config: TarFlowConfig) -> dict[str, Any]:
    """Keywords of :class:`TarFlow`, but for the seed."""
    return {
        "shape": (config.channels, config.height, config.image_width),
        "patch": config.patch,
        "width": config.width,
        "blocks": config.blocks,
        "layers": config.layers,
        "head_width": config.head_width,
        "num_classes": config.classes,
        "noise": config.noise,
        "sigma": config.sigma,
        "preprocess": config.preprocess,
        "volume_preserving": config.volume_preserving,
        "learned_prior": config.learned_prior,
        "direction": config.direction,
        "checkpoint": config.checkpoint,
    }


class TarFlowTask:
    """A flow and the images it learns from.

    Args:
        config: Resolved, see :func:`derived_fields`.
        data: Images of the three splits.

    Raises:
        DataError: The images are of another shape than ``config``, or lack the classes it wants.
    """

    name = "tarflow"

    def __init__(self, config: TarFlowConfig, data: ImageData) -> None:
        expected = (config.channels, config.height, config.image_width)
        if data.shape != expected:
            raise DataError(f"the images are (channels, height, width) {data.shape}, the model is for {expected}")
        if config.classes > 0 and len(data.class_names) != config.classes:
            raise DataError(f"the model is for {config.classes} classes, the images have {len(data.class_names)}")
        self.config = config
        self.data = data
        self.num_examples = data.num_examples
        self.fingerprint = data.fingerprint

    def build(self, seed: int | None) -> TarFlow:
        """The model with its initial weights; None leaves them uninitialised."""
        return TarFlow(**flow_arguments(self.config), levels=_LEVELS, seed=seed)

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits and of the model."""
        with torch.device("meta"):
            model = self.build(None)
        total = sum(p.numel() for p in model.parameters())
        c, h, w = self.data.shape
        splits = {name: len(getattr(self.data, name)) for name in ("train", "validation", "test")}
        lines = [f"{name:<10} {n:>9,} images of {h} x {w} pixels, {c} channels" for name, n in splits.items()]
        if self.data.flip:
            lines.append("every training image also mirrored")
        lines += [f"{name}: {note}" for name, note in self.data.notes.items()]
        lines.append(f"model: {total:,} parameters, {model.tokens} tokens of {model.numbers} numbers")
        facts = {"images": splits, "shape": list(self.data.shape), "licence": self.data.licence}
        return lines, {"parameters_total": total, "parameters_active": total, "data": facts}

    def batch(self, examples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Training images: ``images`` (n, c, h, w) uint8, and ``labels`` (n,) if classes are wanted."""
        return self._tensors(self.data.examples(examples))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """-log p(x) of images with fresh noise, summed, in nats."""
        images = batch["images"]
        labels = batch.get("labels")
        if labels is not None:
            withheld = torch.rand(len(labels), device=labels.device) < self.config.class_dropout
            labels = torch.where(withheld, -1, labels)
        shape, dtype = images.shape, next(model.parameters()).dtype
        draw = torch.rand if self.config.noise == "uniform" else torch.randn
        return self._loss(model, images, draw(shape, dtype=dtype, device=images.device), labels)

    def after_step(self, model: nn.Module, progress: float) -> dict[str, Any]:
        """Nothing to do."""
        return {}

    def step_metrics(self, loss: float) -> dict[str, float]:
        """Bits per dimension, with uniform noise."""
        if self.config.noise != "uniform":
            return {}
        return {"bits_per_dim": (loss + math.log(_LEVELS / 2)) / math.log(2.0)}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Loss, and bits per dimension with uniform noise, of a split; None if stopped midway.

        All images of ``test`` count, and up to 2,000 of ``validation``, evenly spaced. Classes are given.
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
        weight = next(model.parameters())
        total, values = 0.0, 0
        try:
            for start in range(0, count, _EVAL_BATCH):
                if should_stop():
                    return None
                part = numbers[start : start + _EVAL_BATCH]
                labels = None if chosen.labels is None else chosen.labels[part]
                batch = self._tensors(ImageSplit(chosen.images[part], labels))
                draw = stream.uniform if self.config.noise == "uniform" else stream.normal
                noise = torch.from_numpy(draw(start * d, len(part) * d)).view(batch["images"].shape).to(weight)
                batch = {name: tensor.to(weight.device) for name, tensor in batch.items()}
                # A likelihood to be reported is never computed in bfloat16.
                with torch.autocast(weight.device.type, enabled=False):
                    loss = self._loss(model, batch["images"], noise, batch.get("labels"))
                total += float(loss.total)
                values += loss.count
        finally:
            model.train(was_training)
        prefix = "val" if split == "validation" else split
        mean = total / values
        return {f"{prefix}_loss": mean} | {f"{prefix}_{k}": v for k, v in self.step_metrics(mean).items()}

    def sample(self, model: nn.Module, path: Path, seed: int, should_stop: Callable[[], bool]) -> str:
        """A grid of images, of all classes in turn, written to ``path.png``; a stop leaves it out."""
        assert isinstance(model, TarFlow)
        if should_stop():
            return ""
        n, c = self.config.sample_images, self.config
        labels = torch.arange(n) % c.classes if c.classes else None
        guidance = Guidance(c.guidance) if c.guidance and c.classes else None
        # Its precision decides which images come out, not what autocast made of the weights.
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            images = model.sample(n, labels, seed=seed, guidance=guidance, method="sequential").images
        file = path.with_name(path.name + ".png")
        image_grid(as_pixels(images.float().cpu().numpy())).save(file)
        return f"{n} images in {file}"

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one image: 6 per matrix element and token, and causal attention."""
        assert isinstance(model, TarFlow)
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
        attention = model.arguments["blocks"] * self.config.layers * self.config.width * model.tokens
        return 6.0 * model.tokens * (matrices + attention)

    def save_with(self, folder: Path) -> None:
        """Nothing: the configuration holds all that a later use needs."""

    def _tensors(self, split: ImageSplit) -> dict[str, Tensor]:
        tensors = {"images": torch.from_numpy(np.ascontiguousarray(split.images.transpose(0, 3, 1, 2)))}
        if self.config.classes:
            assert split.labels is not None
            tensors["labels"] = torch.from_numpy(split.labels)
        return tensors

    def _loss(self, model: nn.Module, images: Tensor, noise: Tensor, labels: Tensor | None) -> Loss:
        assert isinstance(model, TarFlow)
        if self.config.noise == "uniform":
            x = dequantise(images, noise, _LEVELS)
        else:
            x = images.to(noise.dtype) / 127.5 - 1.0 + self.config.sigma * noise
        return Loss(-model.log_prob(x, labels).sum(), images.numel())
