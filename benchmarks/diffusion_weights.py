"""Make the weights that come with the package from a finished run: ``python -m benchmarks.diffusion_weights RUN NAME``.

    python -m benchmarks.fetch_data fashion-mnist emoji
    quintic train datasets/fashion-mnist --task ddpm --size fashion28 --out runs/fashion28
    python -m benchmarks.diffusion_weights runs/fashion28 fashion28

The averaged weights of the best checkpoint go into ``src/quintic/assets/weights/ddpm`` in half precision, with the error
curve on validation images that the codec's schedule needs, a card, and a sheet of samples.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch

from quintic.core.files import atomic_write, sha256_file
from quintic.data.images import ImageConfig, ImageData, as_pixels, as_signed, image_grid, prepare_images
from quintic.diffusion import DDPMConfig, NetworkDenoiser, UNet, ancestral_sample, load_denoiser, measure_errors
from quintic.diffusion.task import DDPMTask, unet_arguments
from quintic.engine import EngineConfig, Run, Settings
from quintic.engine.checkpoint import load_average, load_model, usable_checkpoint
from quintic.optim import OptimConfig

TARGET = Path(__file__).resolve().parent.parent / "src" / "quintic" / "assets" / "weights" / "ddpm"
LEVELS = [level / 2 for level in range(-20, 25)]
_IMAGES = 500
_LIMIT = 6_000_000
_TYPES = {"ddpm": DDPMConfig, "data": ImageConfig, "optim": OptimConfig, "engine": EngineConfig}


def read_run(folder: Path) -> tuple[UNet, Settings, Path]:
    """Network with averaged weights, settings, and the checkpoint that was taken."""
    settings = Settings.from_toml(Run.open(folder).settings_text(), _TYPES)
    checkpoint = usable_checkpoint(folder / "checkpoints", print, Run.open(folder).best_step())
    assert checkpoint is not None, f"{folder} has no checkpoint"
    network = UNet(**unet_arguments(settings["ddpm"]), seed=None)
    load_model(checkpoint, network)
    average = load_average(checkpoint)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(average[name])
    return network, settings, checkpoint


def ship(folder: Path, name: str, images: ImageData | None = None) -> Path:
    """Write weights, card and samples of a run; returns the file of the weights."""
    network, settings, checkpoint = read_run(folder)
    header = Run.open(folder).header()
    images = images or prepare_images([Path(path) for path in header["paths"]], settings["data"])
    assert images.fingerprint == header["fingerprint"], "the images have changed since the run"
    arguments = unet_arguments(settings["ddpm"])
    file = TARGET / f"{name}.safetensors"
    NetworkDenoiser(network, settings["ddpm"].target, arguments).save(file)
    rounded = load_denoiser(file)
    assert isinstance(rounded, NetworkDenoiser)
    # Measured on the rounded weights, which are what everybody else has.
    chosen = images.validation.images[:: max(1, len(images.validation) // _IMAGES)][:_IMAGES]
    rounded.curve = measure_errors(rounded, torch.from_numpy(as_signed(chosen)), LEVELS)
    rounded.save(file, name=name, licence=images.licence)
    assert file.stat().st_size <= _LIMIT, f"{file} has {file.stat().st_size} bytes, more than {_LIMIT}"

    task = DDPMTask(settings["ddpm"], images)
    losses = {split: task.evaluate(rounded.network, split) or {} for split in ("validation", "test")}
    samples = ancestral_sample(rounded, 64, task.schedule.grid(100), seed=0)
    sheet = io.BytesIO()
    image_grid(as_pixels(samples.numpy()), smallest=1).save(sheet, "PNG", optimize=True)
    atomic_write(TARGET / f"{name}.png", sheet.getvalue())
    atomic_write(TARGET / f"{name}.md", _card(name, file, rounded, settings, images, losses, checkpoint))
    return file


def _card(
    name: str,
    file: Path,
    model: NetworkDenoiser,
    settings: Settings,
    images: ImageData,
    losses: dict[str, dict[str, float]],
    checkpoint: Path,
) -> str:
    engine = settings["engine"]
    c, h, w = model.shape
    step = int(checkpoint.name.removeprefix("step-"))
    rows: dict[str, Any] = {
        "images": f"{h} x {w} pixels, {c} channels, in [-1, 1]",
        "trained on": f"{DATA[name]}: {len(images.train):,} images" + (", each also mirrored" if images.flip else ""),
        "not trained on": f"{len(images.validation):,} validation and {len(images.test):,} test images",
        "licence of the images": images.licence,
        "network": f"U-Net, {sum(p.numel() for p in model.network.parameters()):,} parameters, predicts {model.target}",
        "training": f"preset {name}: {step:,} of {engine.steps:,} steps of {engine.batch_size} images, Muon, "
        f"averaged weights ({engine.ema_decay})",
        "validation loss": f"{losses['validation']['val_loss']:.4f} (squared error of v per value)",
        "test loss": f"{losses['test']['test_loss']:.4f}",
        "file": f"{file.stat().st_size:,} bytes, half precision",
        "SHA-256": f"`{sha256_file(file)}`",
        "fingerprint": f"`{model.fingerprint}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f'# {name}\n\nA denoiser of small images: `quintic.diffusion.shipped_denoiser("{name}")`.\n\n| | |\n|---|---|\n'
        f"{table}\n\nMade with `quintic train {COMMAND[name]} --task ddpm --size {name}` and "
        "`python -m benchmarks.diffusion_weights`. The file also holds its errors on validation images at "
        f"{len(LEVELS)} noise levels.\n\n{name}.png: 64 samples, 100 ancestral steps, seed 0, not chosen.\n\n"
        f"{SEEN[name]}\n"
    )


DATA = {
    "fashion28": "Fashion-MNIST (copyright 2017 Zalando SE)",
    "emoji32": "Noto Emoji at 32 pixels on white (copyright Google), split by groups without skin tone and gender",
}
COMMAND = {"fashion28": "datasets/fashion-mnist", "emoji32": "datasets/emoji"}
SEEN = {
    "fashion28": "What one sees: shirts, pullovers, trousers, dresses, boots, shoes and bags that are told apart at a "
    "glance, with sharp outlines; the cloth of some shirts is mottled, and about one in ten (sandals, crowded prints) "
    "is a muddle.",
    "emoji32": "What one sees: about a quarter are people that are plainly faces with hair and clothes; a few standing "
    "figures, flags and round yellow things; the rest has an emoji's colours, outline and white ground, but is no "
    "object that one could name. 3,125 pictures of 3,000 kinds are few; as a code of real emoji it does better.",
}
"""What one sees on the sheet of samples."""


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2]))
