"""How image models are wired: sections, images, models, generation, evaluation, for TARFLOW and diffusion."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintic.cli.image_classes import class_names, class_number, give_classes
from quintic.cli.outputs import output_path
from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, suggest
from quintic.core.files import check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from quintic.cli.wiring import LoadedModel
    from quintic.data.images import ImageData
    from quintic.diffusion import UNet
    from quintic.engine import Settings, Task
    from quintic.flow import TarFlow

__all__ = [
    "EMBEDDED",
    "NEXT",
    "OF_FILES",
    "READING",
    "UNIT",
    "build",
    "evaluate",
    "generate",
    "prepare",
    "sections",
    "shipped",
    "with_shape",
]

EMBEDDED = "Drawn shapes"
"""Title of the data that comes with the package."""
READING = "reading images"
OF_FILES = ()
"""Settings that say how files are read: pictures tell themselves."""
UNIT = ""
"""Of the loss."""
NEXT = "quintic generate {run} --n 36"
"""What one would do with a finished run."""

_MOST_IMAGES = 10_000  # of one grid, and of one array
_BATCH = 64
_SHOWN = 40  # images with a line of their own in an evaluation


def sections(task: str) -> dict[str, type]:
    """The task's own sections."""
    from quintic.data.images import ImageConfig

    if task == "ddpm":
        from quintic.diffusion import DDPMConfig as Config
    else:
        from quintic.flow import TarFlowConfig as Config
    return {task: Config, "data": ImageConfig}


def prepare(
    task: str, paths: Sequence[Path], settings: Settings, progress: Callable[[str], None]
) -> tuple[Task, Settings, list[str]]:
    """Pictures to arrays, the sizes that follow from them, and the task; see :func:`quintic.cli.wiring.build_task`."""
    from quintic.data.images import prepare_images

    if task == "ddpm":
        from quintic.diffusion.task import derived_fields
    else:
        from quintic.flow.task import derived_fields
    images = prepare_images(list(paths) or None, settings["data"], progress)
    if settings.sources[f"{task}.height"] != "config.toml":  # a run's own settings are resolved already
        for name, (value, why) in derived_fields(settings[task], images).items():
            settings = settings.derive(f"{task}.{name}", value, why)
    return _task(task, settings, images), settings, images.warnings


def with_shape(task: str, settings: Settings) -> Settings:
    """Settings of a model that can be built without data: what its images would tell is assumed."""
    side = settings["data"].size or 28
    assumed = {"channels": 3 if settings["data"].channels == "rgb" else 1, "height": side, "image_width": side}
    for name, value in assumed.items():
        if getattr(settings[task], name) == 0:
            settings = settings.derive(f"{task}.{name}", value, "assumed without images")
    if settings[task].classes == -1:
        settings = settings.derive(f"{task}.classes", 10, "assumed without images")
    return settings


def build(task: str, settings: Settings) -> nn.Module:
    """The model, uninitialised."""
    if task == "ddpm":
        from quintic.diffusion import UNet
        from quintic.diffusion.task import unet_arguments

        return UNet(**unet_arguments(settings[task]), initialize=False)
    from quintic.flow import TarFlow
    from quintic.flow.task import flow_arguments

    return TarFlow(**flow_arguments(settings[task]), initialize=False)


def shipped(task: str, name: str) -> UNet | TarFlow:
    """A trained model that comes with the package."""
    if task == "ddpm":
        from quintic.diffusion import NetworkDenoiser, shipped_denoiser

        denoiser = shipped_denoiser(name)
        assert isinstance(denoiser, NetworkDenoiser)
        return denoiser.network
    from quintic.flow import shipped_flow

    return shipped_flow(name)


def generate(loaded: LoadedModel, folder: Path, options: dict[str, Any]) -> None:
    """A grid of new images as PNG, and the images themselves as an array."""
    n, seed = options.pop("n", 36), options.pop("seed")
    out, overwrite = options.pop("out", None), options.pop("overwrite", False)
    if loaded.shipped:
        default = Path(f"{'-'.join(folder.parts)}-seed{seed}.png")
    else:
        default = folder / "samples" / f"generated-seed{seed}.png"
    if not 1 <= n <= _MOST_IMAGES:
        raise ConfigError(
            f"--n must be 1 to {_MOST_IMAGES:,}, as all are one picture, found {n:,}; for more use other seeds"
        )
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out must name a .png file, found {out}")
    out = output_path(out, default, overwrite, beside=(".npy",))
    check_folder(out.parent)
    if loaded.header["task"] == "ddpm":
        images = _diffuse(loaded, n, seed, options, class_names(loaded, folder))
    else:
        images = _flow(loaded, n, seed, options, class_names(loaded, folder))
    _write_images(images, out)


def evaluate(
    loaded: LoadedModel, folder: Path, paths: Sequence[Path], split: str, options: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """The loss on a split of the run's own images, or scores of others: for a person, and for a script."""
    from quintic.cli.wiring import refuse
    from quintic.data.images import prepare_images

    if split not in ("test", "validation"):
        raise ConfigError(f"unknown split {split!r}{suggest(split, ['test', 'validation'])}")
    settings, header = loaded.settings, loaded.header
    label = options.pop("label", None)
    refuse(options, header["task"])
    if paths:
        # As the model takes them, whatever their own size and colours.
        model = settings[header["task"]]
        side, channels = model.height if model.height == model.image_width else 0, model.channels
        every = replace(
            settings["data"], validation_fraction=0.0, test_fraction=1.0, flip=False, size=side,
            channels="grey" if channels == 1 else "rgb",
        )  # fmt: skip
        problems: list[DataError] = []
        images = prepare_images(list(paths), every, unreadable=problems.append)
        images, words = give_classes(images, model, class_names(loaded, folder), label)
        lines, facts = _score_others(loaded, images, words)
        if problems:
            lines += [f"left out: {problem}" for problem in problems]
            facts["left_out"] = [str(problem) for problem in problems]
        return lines, facts
    if label is not None:
        raise ConfigError("--class is of pictures that are named; the run's own have theirs")
    if loaded.shipped:
        raise ConfigError(f"{folder} comes without its images; name files, folders or idx files to evaluate it on")
    what = f"{split} split of {folder}"
    words = ", each given its class" if settings[header["task"]].classes else ""
    images = prepare_images([Path(path) for path in header["paths"]] or None, settings["data"], lambda _: None)
    task = _task(header["task"], settings, images)
    if task.fingerprint != header["fingerprint"]:
        raise DataError(f"the images of {folder} have changed since it was trained; name those to evaluate on instead")
    with loaded.precision:
        values = task.evaluate(loaded.model, split, lambda: False)
    if not values:
        raise DataError(f"there are no {split} images to evaluate on in {folder}")
    prefix = "val" if split == "validation" else split
    loss, bits = values[f"{prefix}_loss"], values.get(f"{prefix}_bits_per_dim")
    line = f"{what}{words}: {_told(loss, header['task'])}" + (
        "" if bits is None else f", {bits:.4f} bits per dimension"
    )
    return [line], {"data": what, "loss": loss, **({} if bits is None else {"bits_per_dim": bits})}


def _diffuse(
    loaded: LoadedModel, n: int, seed: int, options: dict[str, Any], names: Sequence[str]
) -> NDArray[np.uint8]:
    """Images of a diffusion model, (n, h, w, c)."""
    import numpy as np

    from quintic.cli.wiring import refuse
    from quintic.data.images import as_pixels
    from quintic.diffusion import NetworkDenoiser, NoiseSchedule, ancestral_sample, ddim_sample
    from quintic.diffusion.samplers import seeded_noise
    from quintic.diffusion.task import unet_arguments

    c = loaded.settings["ddpm"]
    steps, sampler = options.pop("steps", c.sample_steps), options.pop("sampler", "ddim")
    label, guidance = options.pop("label", None), options.pop("guidance", 0.0)
    refuse(options, "ddpm")
    labels = None if label is None else class_number(label, c.classes, names)
    if guidance and labels in (None, -1):
        needs = "a class to go to: --class NAME" if c.classes else "a model with classes; this one was trained without"
        raise ConfigError(f"--guidance needs {needs}")
    if not c.class_dropout and (guidance or labels == -1):
        asked = "--guidance" if guidance else "--class -1"
        raise ConfigError(f"{asked} needs a model that has seen images without their class, found ddpm.class_dropout=0")
    samplers = {"ddim": ddim_sample, "ancestral": ancestral_sample}
    if sampler not in samplers:
        raise ConfigError(f"unknown sampler {sampler!r}{suggest(sampler, samplers)}")
    if steps < 2:
        raise ConfigError(f"--steps must be at least 2, found {steps}")
    denoiser = NetworkDenoiser(loaded.model, c.target, unet_arguments(c))  # type: ignore[arg-type]
    levels = NoiseSchedule(c.schedule, c.log_snr_min, c.log_snr_max, c.shift).grid(steps)
    parts = []
    with loaded.precision:
        for first in range(0, n, _BATCH):
            count = min(_BATCH, n - first)
            noise = seeded_noise(seed, count, denoiser.shape, first)
            drawn = samplers[sampler](denoiser, count, levels, labels=labels, guidance=guidance, noise=noise)
            parts.append(as_pixels(drawn.cpu().numpy()))
    return np.concatenate(parts)


def _flow(loaded: LoadedModel, n: int, seed: int, options: dict[str, Any], names: Sequence[str]) -> NDArray[np.uint8]:
    """Images of a TARFLOW, (n, h, w, c); always in the model's own precision, else the inversion is not exact."""
    import torch

    from quintic.cli.wiring import refuse
    from quintic.data.images import as_pixels
    from quintic.flow import Guidance

    c = loaded.settings["tarflow"]
    label, strength = options.pop("label", None), options.pop("guidance", 0.0)
    temperature, method = options.pop("temperature", None), options.pop("method", "auto")
    denoise = options.pop("denoise", None)
    refuse(options, "tarflow")
    labels = None
    if label is not None:
        labels = torch.full((n,), class_number(label, c.classes, names))
    elif c.classes:
        labels = torch.arange(n) % c.classes
    guidance = None
    if strength and c.classes and not c.class_dropout:
        raise ConfigError(
            "--guidance needs a model that has seen images without their class, found tarflow.class_dropout=0"
        )
    if strength:
        guidance = Guidance(strength) if temperature is None else Guidance(strength, temperature=temperature)
    model: TarFlow = loaded.model  # type: ignore[assignment]
    found = model.sample(n, labels, seed=seed, method=method, guidance=guidance, denoise=denoise)
    return as_pixels(found.images.float().cpu().numpy())


def _told(loss: float, task: str) -> str:
    from quintic.report.records import loss_unit

    return f"loss {loss:.5f} ({loss_unit(task)})"


def _score_others(loaded: LoadedModel, images: ImageData, words: str) -> tuple[list[str], dict[str, Any]]:
    """Likelihood and strangeness of images under a flow; the loss under a diffusion model.

    ``words`` say what class they were given.
    """
    import numpy as np

    task, split = loaded.header["task"], images.test
    classes = {}
    if split.labels is not None:
        classes["classes"] = [images.class_names[label] for label in split.labels]
    if task == "ddpm":
        with loaded.precision:
            values = _task(task, loaded.settings, images).evaluate(loaded.model, "test", lambda: False)
        assert values is not None
        loss = values["test_loss"]
        return [f"{len(split)} images{words}: {_told(loss, task)}"], {"images": len(split), "loss": loss, **classes}
    from quintic.flow import score_images

    scores = score_images(loaded.model, split.images, split.labels)  # type: ignore[arg-type]
    bits, strange = np.asarray(scores.bits_per_dim), np.asarray(scores.outlier)
    lines = []
    names = split.files or [str(i) for i in range(len(split))]
    shown = range(len(split))
    if len(split) > _SHOWN:
        shown = np.argsort(-strange, kind="stable")[:_SHOWN]
        lines.append(f"the {_SHOWN} strangest (--json has all)")
    lines.append("bits per dimension  outlier score  image")
    lines += [f"{bits[i]:>18.4f}  {strange[i]:>13.4f}  {names[i]}" for i in shown]
    low, middle, high = np.percentile(strange, (25, 50, 75))
    lines.append(
        f"{len(split)} images{words}: {bits.mean():.4f} bits per dimension; outlier score (bits of the flow beyond "
        f"those of PNG, higher is stranger) quartiles {low:.3f}, {middle:.3f}, {high:.3f}"
    )
    each = {"bits_per_dim_of_each": bits.tolist(), "outlier_score_of_each": strange.tolist()}
    files = {"files": list(split.files)} if split.files else {}
    return lines, {"images": len(split), "bits_per_dim": float(bits.mean()), **files, **classes, **each}


def _write_images(images: NDArray[np.uint8], out: Path) -> None:
    """Write a grid as PNG and the images (n, h, w, c) as .npy beside it, and say so."""
    import numpy as np

    from quintic.core.files import atomic_write
    from quintic.data.images import image_grid

    picture, array = io.BytesIO(), io.BytesIO()
    image_grid(images).save(picture, "PNG")
    np.save(array, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, picture.getvalue())
    atomic_write(out.with_suffix(".npy"), array.getvalue())
    say(f"{len(images)} images in {out} and {out.with_suffix('.npy').name}")


def _task(task: str, settings: Settings, images: ImageData) -> Task:
    if task == "ddpm":
        from quintic.diffusion.task import DDPMTask

        return DDPMTask(settings[task], images)
    from quintic.flow.task import TarFlowTask

    return TarFlowTask(settings[task], images)
