"""Make the weights that come with the package from a finished run: ``python -m benchmarks.weights RUN``.

    python -m benchmarks.fetch_data fashion-mnist emoji
    quintic train datasets/fashion-mnist --task ddpm --size fashion28 --out runs/fashion28
    python -m benchmarks.weights runs/fashion28

The averaged weights of the best checkpoint go into ``src/quintic/assets/weights/TASK`` in half precision under the name
of the preset that trained them, with a card and a sheet of samples; a denoiser also with the error curve on validation
images that the codec's schedule needs.
"""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quintic.cli.wiring import LoadedModel, build_task, load_run_model, open_run, pick_checkpoint
from quintic.core.files import atomic_write, sha256_file
from quintic.data.images import ImageData, as_pixels, as_signed, image_grid
from quintic.diffusion import NetworkDenoiser, UNet, ancestral_sample, load_denoiser, measure_errors
from quintic.diffusion.residuals import measure_residuals
from quintic.diffusion.task import DDPMTask, unet_arguments
from quintic.flow import Guidance, TarFlow, load_flow, save_flow
from quintic.flow.task import TarFlowTask

TARGET = Path(__file__).resolve().parent.parent / "src" / "quintic" / "assets" / "weights"
LIMIT = 6_000_000
"""Bytes of a file."""
LEVELS = [level / 2 for level in range(-20, 25)]
_IMAGES = 500

DATA = {
    "fashion28": ("datasets/fashion-mnist", "Fashion-MNIST (copyright 2017 Zalando SE)"),
    "emoji32": (
        "datasets/emoji",
        "Noto Emoji at 32 pixels on white (copyright Google), split by groups without skin tone and gender",
    ),
}
"""Name of a preset: folder of its images, and whose they are."""
SEEN = {
    "ddpm/fashion28": "shirts, pullovers, trousers, dresses, boots, shoes and bags that are told apart at a "
    "glance, with sharp outlines; the cloth of some shirts is mottled, and about one in ten (sandals, crowded prints) "
    "is a muddle.",
    "ddpm/emoji32": "about a quarter are people that are plainly faces with hair and clothes; a few standing "
    "figures, flags and round yellow things; the rest has an emoji's colours, outline and white ground, but is no "
    "object that one could name. 3,125 pictures of 3,000 kinds are few; as a code of real emoji it does better.",
    "tarflow/fashion28": "every image is the garment that was asked for, and nearly all could be worn: tops with "
    "sleeves and collars, trousers, dresses, boots, sneakers; cloth is flat or streaked, sandals and some bags torn.",
}
"""What one sees on the sheets of samples; to be written after looking."""


def ship(folder: Path) -> Path:
    """Write weights, card and samples of a run; returns the file of the weights."""
    run, settings, header = open_run(folder)
    task, _, _ = build_task(header["task"], [Path(path) for path in header["paths"]], settings)
    assert task.fingerprint == header["fingerprint"], "the images have changed since the run"
    assert isinstance(task, DDPMTask | TarFlowTask)
    checkpoint = pick_checkpoint(run, "best")
    assert checkpoint is not None, f"{folder} has no checkpoint"
    loaded = load_run_model(folder, "best", "cpu", "float32")
    file = TARGET / header["task"] / f"{header['size']}.safetensors"
    file.parent.mkdir(exist_ok=True)
    make = _denoiser if isinstance(task, DDPMTask) else _flow
    facts, samples, remarks = make(task, loaded, file)  # type: ignore[arg-type]
    assert file.stat().st_size <= LIMIT, f"{file} has {file.stat().st_size} bytes, more than {LIMIT}"
    sheet = io.BytesIO()
    image_grid(samples, smallest=1).save(sheet, "PNG", optimize=True)
    atomic_write(file.with_suffix(".png"), sheet.getvalue())
    step = int(checkpoint.name.removeprefix("step-"))
    atomic_write(file.with_suffix(".md"), _card(file, loaded, task.data, step, facts, remarks))
    return file


def _denoiser(
    task: DDPMTask, loaded: LoadedModel, file: Path
) -> tuple[dict[str, str], np.ndarray[Any, np.dtype[np.uint8]], list[str]]:
    assert isinstance(loaded.model, UNet)
    NetworkDenoiser(loaded.model, task.config.target, unet_arguments(task.config)).save(file)
    rounded = load_denoiser(file)
    assert isinstance(rounded, NetworkDenoiser)
    # Measured on the rounded weights, which are what everybody else has.
    held_out = task.data.validation.images
    chosen = held_out[:: max(1, len(held_out) // _IMAGES)][:_IMAGES]
    x = torch.from_numpy(as_signed(chosen))
    rounded.curve = replace(measure_errors(rounded, x, LEVELS), residuals=measure_residuals(rounded, x))
    rounded.save(file, name=file.stem, licence=task.data.licence)
    losses = {**(task.evaluate(rounded.network, "validation") or {}), **(task.evaluate(rounded.network, "test") or {})}
    samples = ancestral_sample(rounded, 64, task.schedule.grid(100), seed=0)
    facts = {
        "network": f"U-Net, {sum(p.numel() for p in rounded.network.parameters()):,} parameters, "
        f"predicts {rounded.target}",
        "validation loss": f"{losses['val_loss']:.4f} (squared error of {rounded.target} per value)",
        "test loss": f"{losses['test_loss']:.4f}",
        "fingerprint": f"`{rounded.fingerprint}`",
    }
    remarks = [
        f'A denoiser of small images: `quintic.diffusion.shipped_denoiser("{file.stem}")`.',
        f"The file also holds its errors on validation images at {len(LEVELS)} noise levels, and what they look like.",
        "64 samples, 100 ancestral steps, seed 0, not chosen.",
    ]
    return facts, as_pixels(samples.numpy()), remarks


def _flow(
    task: TarFlowTask, loaded: LoadedModel, file: Path
) -> tuple[dict[str, str], np.ndarray[Any, np.dtype[np.uint8]], list[str]]:
    assert isinstance(loaded.model, TarFlow)
    save_flow(loaded.model, file, name=file.stem, licence=task.data.licence)
    rounded = load_flow(file)
    losses = {**(task.evaluate(rounded, "validation") or {}), **(task.evaluate(rounded, "test") or {})}
    c = task.config
    samples = rounded.sample(80, torch.arange(80) % c.classes, seed=0, guidance=Guidance(c.guidance)).images
    facts = {
        "network": f"TARFLOW, {sum(p.numel() for p in rounded.parameters()):,} parameters, {rounded.num_classes} "
        f"classes, gaussian noise of size {c.sigma:g}",
        "validation loss": f"{losses['val_loss']:.4f} (nats per value of the noisy image, classes given)",
        "test loss": f"{losses['test_loss']:.4f}",
    }
    remarks = [
        f'A flow of small images: `quintic.flow.shipped_flow("{file.stem}")`.',
        f"`quintic generate tarflow/{file.stem} --n 64 --class 3 --guidance 2` shows some.",
        f"80 samples, eight of each class, guidance {c.guidance:g}, denoised, seed 0, not chosen.",
    ]
    return facts, as_pixels(samples.numpy()), remarks


def _card(
    file: Path, loaded: LoadedModel, images: ImageData, step: int, facts: dict[str, str], remarks: list[str]
) -> str:
    task, name, engine = file.parent.name, file.stem, loaded.settings["engine"]
    folder, whose = DATA[name]
    c, h, w = images.shape
    rows = {
        "images": f"{h} x {w} pixels, {c} channels, in [-1, 1]",
        "trained on": f"{whose}: {len(images.train):,} images" + (", each also mirrored" if images.flip else ""),
        "not trained on": f"{len(images.validation):,} validation and {len(images.test):,} test images",
        "licence of the images": images.licence,
        "training": f"preset {name}: {step:,} of {engine.steps:,} steps of {engine.batch_size} images, Muon, "
        f"averaged weights ({engine.ema_decay})",
        **facts,
        "file": f"{file.stat().st_size:,} bytes, half precision",
        "SHA-256": f"`{sha256_file(file)}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    opening, more, sheet = remarks
    return (
        f"# {name}\n\n{opening}\n\n| | |\n|---|---|\n{table}\n\n"
        f"Made with `quintic train {folder} --task {task} --size {name}` and `python -m benchmarks.weights`. {more}\n\n"
        f"{name}.png: {sheet} What one sees: {SEEN.get(f'{task}/{name}', 'not yet looked at.')}\n"
    )


if __name__ == "__main__":
    print(ship(Path(sys.argv[1])))
