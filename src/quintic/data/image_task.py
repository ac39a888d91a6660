"""What all training on images has in common: the splits, their description, and a validation whose noise is fixed.

The noise of validation is a pure function of the image's number, so that two validations differ by the weights alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quintic.core import DataError, SamplingError
from quintic.core.counter_rng import Stream
from quintic.core.loss import Loss
from quintic.core.ranks import ALONE, Ranks
from quintic.data.images import ImageData, ImageSplit, as_pixels, image_grid

__all__ = ["ImageTask", "image_fields"]

_EVAL_BATCH = 100
_VALIDATION_IMAGES = 2000
_GAPS = 1.4
"""Memory of a process for each byte of tensors that it keeps on a CPU: 1.2 to 1.7 where it was measured, with the heap
of the C library on Linux, which does not fill every gap that a tensor leaves."""


class _Stopped(Exception):
    """Somebody asked for a stop."""


def image_fields(section: str, config: Any, data: ImageData) -> dict[str, tuple[Any, str]]:
    """Numbers of a model that follow from the images: {field: (value, where it comes from)}.

    Args:
        section: Name of the settings' section, for messages.
        config: With ``channels``, ``height``, ``image_width`` (0: to be found out) and ``classes`` (-1: likewise).
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
            raise DataError(
                f"{section}.classes = -1 wants the classes of the data, but these images have no labels; put each "
                f"class in a folder of its own, or train without classes: {section}.classes=0"
            )
        found["classes"] = (len(data.class_names), "the images' labels")
    return found


class ImageTask(ABC):
    """Base of the tasks whose examples are images; a subclass says what the model and the loss are.

    Args:
        config: Resolved, see :func:`image_fields`.
        data: Images of the three splits.

    Raises:
        DataError: The images are of another shape than ``config``, or lack the classes it wants.
    """

    name: str
    """Of the task."""

    def __init__(self, config: Any, data: ImageData) -> None:
        expected = (config.channels, config.height, config.image_width)
        if data.shape != expected:
            raise DataError(f"the images are (channels, height, width) {data.shape}, the model is for {expected}")
        if config.classes > 0 and len(data.class_names) != config.classes:
            raise DataError(f"the model is for {config.classes} classes, the images have {len(data.class_names)}")
        if config.classes and len(data.train) and data.train.labels is None:
            raise DataError("the model is to learn classes, and the training images have no labels")
        self.data = data
        self.num_classes: int = config.classes
        self.num_examples = data.num_examples
        self.fingerprint = data.fingerprint

    @abstractmethod
    def build(self, seed: int | None = None, *, initialize: bool = True) -> nn.Module:
        """The model; arguments as of its constructor."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Loss of a batch of training images."""

    @abstractmethod
    def pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """Images (n, h, w, c) as the model's loss wants them, (n, c, h, w)."""

    @abstractmethod
    def evaluation_loss(self, model: nn.Module, batch: dict[str, Tensor], noise: Stream, first: int) -> Loss:
        """Loss of evaluated images number ``first`` and on, with noise that :meth:`noise` takes from the stream."""

    @abstractmethod
    def draw(self, model: nn.Module, seed: int, check: Callable[[], None]) -> Tensor:
        """Images for a look, (n, c, h, w) in [-1, 1]; ``check`` is called often, and what it raises passes through."""

    def describe_images(self) -> tuple[list[str], dict[str, Any]]:
        """Sizes of the splits, in lines for a person and as facts."""
        c, h, w = self.data.shape
        splits = {name: len(getattr(self.data, name)) for name in ("train", "validation", "test")}
        colours = "grey" if c == 1 else "in colour"
        lines = [f"{name:<10} {n:>9,} images of {h} x {w} pixels, {colours}" for name, n in splits.items()]
        if self.data.flip:
            lines.append("every training image also mirrored")
        lines += [f"{name}: {note}" for name, note in self.data.notes.items()]
        facts = {"images": splits, "shape": list(self.data.shape), "licence": self.data.licence}
        return lines, facts | ({"classes": list(self.data.class_names)} if self.num_classes else {})

    def batch(self, examples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Training images: ``images`` (n, c, h, w), and ``labels`` (n,) if classes are wanted."""
        return self.tensors(self.data.examples(examples))

    def tensors(self, split: ImageSplit) -> dict[str, Tensor]:
        """Images of a split, and their labels if classes are wanted and known; else the model is told no class."""
        tensors = {"images": self.pixels(split.images)}
        if self.num_classes and split.labels is not None:
            tensors["labels"] = torch.from_numpy(split.labels)
        return tensors

    def saved_numbers_per_image(self) -> float:
        """Numbers that a training step keeps of an image for its backward pass, as seen when one is sent through."""
        model = self.build(initialize=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, Tensor] = {}  # the tensors themselves, so that no two have one address in turn

        def keep(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in held:
                kept[place] = tensor
            return tensor

        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss(model, self.batch(np.zeros(1, dtype=np.int64)))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4

    def numbers_in_memory_per_image(self, device_type: str) -> float:
        """Numbers for which a training step needs memory, per image: those it keeps, and on a CPU gaps between them."""
        return self.saved_numbers_per_image() * (_GAPS if device_type == "cpu" else 1.0)

    def after_step(self, model: nn.Module, progress: float) -> dict[str, Any]:
        """Nothing to do."""
        return {}

    def step_metrics(self, loss: float) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, should_stop: Callable[[], bool] = lambda: False, ranks: Ranks = ALONE
    ) -> dict[str, float] | None:
        """Mean loss of a split per value, and its views; None if stopped midway.

        All images of ``test`` count, and up to 2,000 of ``validation``, evenly spaced. Classes are given, where images
        have them. Ranks share them out.
        """
        chosen: ImageSplit = getattr(self.data, split)
        if not len(chosen):
            return {}  # no such split was asked for
        count = min(len(chosen), _VALIDATION_IMAGES) if split == "validation" else len(chosen)
        numbers = np.arange(count) * len(chosen) // count
        noise = Stream(0, "evaluation noise", split)
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        total, values = 0.0, 0
        try:
            for turn in ranks.turns(-(-count // _EVAL_BATCH)):
                if should_stop():
                    return None
                first = _EVAL_BATCH * (turn or 0)
                part = numbers[first : first + _EVAL_BATCH]
                labels = None if chosen.labels is None else chosen.labels[part]
                batch = self.tensors(ImageSplit(chosen.images[part], labels))
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                loss = self.evaluation_loss(model, batch, noise, first)
                if turn is not None:  # else for company: ranks that share weights work together
                    total += float(loss.total)
                    values += loss.count
        finally:
            model.train(was_training)
        total, values = ranks.sum(total, values)
        prefix, mean = "val" if split == "validation" else split, total / values
        return {f"{prefix}_{name}": value for name, value in {"loss": mean, **self.step_metrics(mean)}.items()}

    def sample(self, model: nn.Module, path: Path, seed: int, should_stop: Callable[[], bool]) -> str:
        """A grid of images, written to ``path.png``; a stop leaves it out, and so do weights that give none yet."""

        def check() -> None:
            if should_stop():
                raise _Stopped

        try:
            check()
            images = self.draw(model, seed, check)
        except _Stopped:
            return ""
        except SamplingError as problem:  # no reason to end a training
            return f"no sample: {problem}"
        file = path.with_name(path.name + ".png")
        image_grid(as_pixels(images.float().cpu().numpy())).save(file)
        return f"{len(images)} images in {file}"

    def noise(self, draw: Callable[[int, int], NDArray[np.float64]], images: Tensor, first: int) -> Tensor:
        """Numbers of a stream for images number ``first`` and on, (n, c, h, w) float64."""
        d = math.prod(self.data.shape)
        return torch.from_numpy(draw(first * d, len(images) * d)).view(images.shape)

    def save_with(self, folder: Path) -> None:  # noqa: B027 (most have nothing to write)
        """Nothing: the configuration holds all that a later use needs."""
