"""Training a TARFLOW: images in, negative log-density out, a grid of samples.

Satisfies the engine's task protocol. The loss is -log p(x) per number of an image, in nats, of pixels from -1 to 1, all
constants included. With ``noise = "gaussian"`` x is the image plus noise of size sigma, and the flow learns the density
of noisy images, to be denoised after sampling. With ``noise = "uniform"`` x is dequantised, and

    bits per dimension = (loss + log 128) / log 2

bounds the code length of the image itself. Training noise comes from torch's generator, which the loop seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.core.loss import Loss
from quintic.data.image_task import ImageTask, image_fields
from quintic.data.images import ImageData
from quintic.flow.block import Linear
from quintic.flow.config import TarFlowConfig
from quintic.flow.guidance import Guidance
from quintic.flow.inner import Inner
from quintic.flow.likelihood import dequantise
from quintic.flow.patches import check_patch
from quintic.flow.tarflow import TarFlow

__all__ = ["TarFlowTask", "derived_fields", "flow_arguments"]

_LEVELS = 256
_HEAP_OF_BLOCKS = 0.9
"""Memory of a process on a CPU that computes blocks again, as a part of what all blocks would keep without that: 0.8 to
0.95 where it was measured, with 4 blocks and with 8."""


def derived_fields(config: TarFlowConfig, data: ImageData) -> dict[str, tuple[Any, str]]:
    """Numbers that follow from the data: {field: (value, where it comes from)}.

    Args:
        config: With 0 for what is to be found out, and ``classes`` -1.
        data: The images.

    Raises:
        DataError: Classes were asked for, and the images have none.
        ConfigError: The patch does not divide the images.
    """
    found = image_fields("tarflow", config, data)
    names = ("channels", "height", "image_width")
    channels, height, width = (found[name][0] if name in found else getattr(config, name) for name in names)
    try:
        check_patch((channels, height, width), config.patch)
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
        "spline_bins": config.spline_bins,
        "inner_width": config.inner_width,
        "volume_preserving": config.volume_preserving,
        "learned_prior": config.learned_prior,
        "direction": config.direction,
        "checkpoint": config.checkpoint,
    }


class TarFlowTask(ImageTask):
    """A flow and the images it learns from.

    Args:
        config: Resolved, see :func:`derived_fields`.
        data: Images of the three splits.

    Raises:
        DataError: The images are of another shape than ``config``, or lack the classes it wants.
    """

    name = "tarflow"
    samples_whole = True

    def __init__(self, config: TarFlowConfig, data: ImageData) -> None:
        super().__init__(config, data)
        self.config = config

    def build(self, seed: int | None = None, *, initialize: bool = True) -> TarFlow:
        """The model; arguments as of its constructor."""
        return TarFlow(**flow_arguments(self.config), levels=_LEVELS, seed=seed, initialize=initialize)

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits and of the model."""
        with torch.device("meta"):
            model = self.build(initialize=False)
        total = sum(p.numel() for p in model.parameters())
        lines, facts = self.describe_images()
        lines.append(f"model: {total:,} parameters, {model.tokens} tokens of {model.numbers} numbers")
        return lines, {"parameters_total": total, "parameters_active": total, "data": facts}

    def pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """As they are, uint8: noise makes numbers of them."""
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

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

    def step_metrics(self, loss: float) -> dict[str, float]:
        """Bits per dimension, with uniform noise."""
        if self.config.noise != "uniform":
            return {}
        return {"bits_per_dim": (loss + math.log(_LEVELS / 2)) / math.log(2.0)}

    def evaluation_loss(self, model: nn.Module, batch: dict[str, Tensor], noise: Stream, first: int) -> Loss:
        """-log p(x) of images with fixed noise; never computed in bfloat16, since it is reported."""
        images, weight = batch["images"], next(model.parameters())
        drawn = self.noise(noise.uniform if self.config.noise == "uniform" else noise.normal, images, first)
        with torch.autocast(weight.device.type, enabled=False):
            return self._loss(model, images, drawn.to(weight), batch.get("labels"))

    def draw(self, model: nn.Module, seed: int, check: Callable[[], None]) -> Tensor:
        """Images of all classes in turn."""
        assert isinstance(model, TarFlow)
        n, c = self.config.sample_images, self.config
        labels = torch.arange(n, device="cpu") % c.classes if c.classes else None
        guidance = Guidance(c.guidance) if c.guidance and c.classes else None
        return model.sample(n, labels, seed=seed, guidance=guidance, method="sequential", check=check).images

    def saved_numbers_per_image(self) -> float:
        """With checkpoint also those of a block, while it is computed again."""
        kept = super().saved_numbers_per_image()
        if not self.config.checkpoint:
            return kept
        return kept + self._saved_by_all_blocks() / self.config.blocks

    def numbers_in_memory_per_image(self, device_type: str) -> float:
        """With checkpoint on a CPU about as much as without: a block can hardly use the memory that the last one freed.

        Gradients of weights are put there in between, and the gaps that remain are too small.
        """
        if not self.config.checkpoint or device_type != "cpu":
            return super().numbers_in_memory_per_image(device_type)
        return _HEAP_OF_BLOCKS * self._saved_by_all_blocks()

    def _saved_by_all_blocks(self) -> float:
        """Numbers kept of an image without checkpoint."""
        return TarFlowTask(replace(self.config, checkpoint=False), self.data).saved_numbers_per_image()

    def flops_per_example(self, model: nn.Module) -> float:
        """Forward and backward FLOPs of one image: 6 per matrix element and token, and causal attention."""
        assert isinstance(model, TarFlow)
        matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
        matrices += sum(m.read.numel() + m.leave.numel() for m in model.modules() if isinstance(m, Inner))
        attention = model.arguments["blocks"] * self.config.layers * self.config.width * model.tokens
        return 6.0 * model.tokens * (matrices + attention)

    def _loss(self, model: nn.Module, images: Tensor, noise: Tensor, labels: Tensor | None) -> Loss:
        assert isinstance(model, TarFlow)
        if self.config.noise == "uniform":
            x = dequantise(images, noise, _LEVELS)
        else:
            x = images.to(noise.dtype) / 127.5 - 1.0 + self.config.sigma * noise
        return Loss(-model.log_prob(x, labels).sum(), images.numel())
