"""How image models are wired: sections, images, model, generation, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, suggest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from quintic.cli.wiring import LoadedModel
    from quintic.data.images import ImageData
    from quintic.engine import Settings, Task

__all__ = ["EMBEDDED", "NEXT", "READING", "UNIT", "build", "evaluate", "generate", "prepare", "sections"]

EMBEDDED = "drawn shapes"
"""Title of the data that comes with the package."""
READING = "reading images"
UNIT = ""
"""Of the loss."""
NEXT = "quintic generate {run} --n 36"

_BATCH = 64


def sections(task: str) -> dict[str, type]:
    """The task's own sections."""
    from quintic.data.images import ImageConfig
    from quintic.diffusion import DDPMConfig

    return {task: DDPMConfig, "data": ImageConfig}


def prepare(
    task: str, paths: Sequence[Path], settings: Settings, progress: Callable[[str], None]
) -> tuple[Task, Settings, list[str]]:
    """Pictures to arrays, the sizes that follow from them, and the task; see :func:`quintic.cli.wiring.build_task`."""
    from quintic.data.images import prepare_images
    from quintic.diffusion.task import derived_fields

    images = prepare_images(list(paths) or None, settings["data"], progress)
    if settings.sources[f"{task}.height"] != "config.toml":  # a run's own settings are resolved already
        for name, (value, why) in derived_fields(settings[task], images).items():
            settings = settings.derive(f"{task}.{name}", value, why)
    return _task(task, settings, images), settings, images.warnings


def build(task: str, settings: Settings) -> nn.Module:
    """The model, uninitialised."""
    from quintic.diffusion import UNet
    from quintic.diffusion.task import unet_arguments

    return UNet(**unet_arguments(settings[task]), seed=None)


def generate(loaded: LoadedModel, folder: Path, options: dict[str, Any]) -> None:
    """A grid of new images as PNG, and the images themselves as an array."""
    from quintic.cli.wiring import refuse
    from quintic.data.images import as_pixels
    from quintic.diffusion import NetworkDenoiser, NoiseSchedule, ancestral_sample, ddim_sample
    from quintic.diffusion.samplers import seeded_noise
    from quintic.diffusion.task import unet_arguments

    c = loaded.settings["ddpm"]
    n, seed = options.pop("n", 36), options.pop("seed")
    steps, sampler = options.pop("steps", c.sample_steps), options.pop("sampler", "ddim")
    out = options.pop("out", None)
    refuse(options, "ddpm")
    samplers = {"ddim": ddim_sample, "ancestral": ancestral_sample}
    if sampler not in samplers:
        raise ConfigError(f"unknown sampler {sampler!r}{suggest(sampler, samplers)}")
    denoiser = NetworkDenoiser(loaded.model, c.target, unet_arguments(c))
    levels = NoiseSchedule(c.schedule, c.log_snr_min, c.log_snr_max, c.shift).grid(steps)
    parts = []
    with loaded.precision:
        for first in range(0, n, _BATCH):
            count = min(_BATCH, n - first)
            noise = seeded_noise(seed, count, denoiser.shape, first)
            parts.append(as_pixels(samplers[sampler](denoiser, count, levels, noise=noise).cpu().numpy()))
    write_images(parts, out or folder / "samples" / f"generated-seed{seed}.png")


def evaluate(loaded: LoadedModel, folder: Path, paths: Sequence[Path], split: str) -> None:
    """Print the loss on a split of the run's own images, or on others."""
    from dataclasses import replace

    from quintic.data.images import prepare_images

    if split not in ("test", "validation"):
        raise ConfigError(f"unknown split {split!r}{suggest(split, ['test', 'validation'])}")
    settings, header = loaded.settings, loaded.header
    if paths:
        split, what = "test", ", ".join(map(str, paths))
        every = replace(settings["data"], validation_fraction=0.0, test_fraction=0.999)
        images = prepare_images(list(paths), every, lambda _: None)
    else:
        what = f"{split} split of {folder}"
        images = prepare_images([Path(path) for path in header["paths"]] or None, settings["data"], lambda _: None)
    task = _task(header["task"], settings, images)
    if not paths and task.fingerprint != header["fingerprint"]:
        raise DataError(
            f"the images of {folder} have changed since it was trained; name the ones to evaluate on instead"
        )
    with loaded.precision:
        values = task.evaluate(loaded.model, split, lambda: False)
    if not values:
        raise DataError(f"there are no {split} images to evaluate on in {what}")
    say(f"{what}: loss {values[f'{split}_loss' if split == 'test' else 'val_loss']:.5f}")


def write_images(parts: list[NDArray[np.uint8]], out: Path) -> None:
    """Write a grid as PNG and the images (n, h, w, c) as .npy beside it, and say so."""
    import io

    import numpy as np

    from quintic.core.files import atomic_write
    from quintic.diffusion.task import image_grid

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out must name a .png file, found {out}")
    images = np.concatenate(parts)
    picture, array = io.BytesIO(), io.BytesIO()
    image_grid(images).save(picture, "PNG")
    np.save(array, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, picture.getvalue())
    atomic_write(out.with_suffix(".npy"), array.getvalue())
    say(f"{len(images)} images in {out} and {out.with_suffix('.npy').name}")


def _task(task: str, settings: Settings, images: ImageData) -> Task:
    from quintic.diffusion.task import DDPMTask

    return DDPMTask(settings[task], images)
