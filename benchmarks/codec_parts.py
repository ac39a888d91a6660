"""What the codec's benchmark measures with: images, models, the smallest files of others."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.fetch_data import fetch
from quintic.codec.chain import aim, run_chain
from quintic.codec.comparison import classic_file, quality_of
from quintic.codec.models import Model, as_model
from quintic.codec.schedule import Plan, atoms_that_fit, matched_levels, preset_number, preset_plan
from quintic.core.files import atomic_write
from quintic.data.images import ImageConfig, ImageData, as_signed, prepare_images
from quintic.diffusion import GaussianDenoiser

SETS = {"fashion28": ("fashion-mnist", ImageConfig()), "emoji32": ("emoji", ImageConfig(size=32, channels="rgb"))}
BATCH = 50
STANDARD = preset_number("standard", True)
FOLDER = Path("runs") / "benchmarks" / "codec"


def part(name: str, make: Callable[[], Any]) -> Any:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        started = time.perf_counter()
        atomic_write(path, json.dumps(make()))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def images(name: str) -> ImageData:
    folder, config = SETS[name]
    return prepare_images([fetch(folder)], config)


def some(data: ImageData, count: int) -> NDArray[np.uint8]:
    """Test images, evenly taken."""
    test = data.test.images
    return test[:: max(1, len(test) // count)][:count]


def gaussian_model(data: ImageData, count: int = 20_000, rank: int = 1500) -> Model:
    train = torch.from_numpy(as_signed(data.train.images[:count]))
    return as_model(GaussianDenoiser.fit(train, None if math.prod(data.shape) <= rank else rank))


def psnrs(pixels: NDArray[np.uint8], signed: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each image, after rounding to bytes."""
    rounded = np.clip(np.floor((signed.astype(np.float64) + 1.0) * 127.5 + 0.5), 0, 255).transpose(0, 2, 3, 1)
    error = np.square(rounded - pixels).mean((1, 2, 3))
    return 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-3))


def coded(model: Model, plan: Plan, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What decoding would make; many images per call, so that the study is quick."""
    x = as_signed(pixels)
    choose = aim(plan, lambda x0, noisy, level: x - x0, [])
    return run_chain(model.denoiser, plan, len(x), choose, curve=model.curve, batch=BATCH, kept=model.kept)


def standard(model: Model, bits: int, preset: int = STANDARD) -> Plan:
    return preset_plan(preset, model.curve, model.dimension, atoms_that_fit(preset, model.dimension, bits))


def single_matched(model: Model, steps: int, size: int) -> Plan:
    """One atom of a Gaussian codebook a step as in the paper, at matched levels."""
    levels = matched_levels(model.curve, [size.bit_length() - 1] * steps)
    return Plan(levels, (1,) * steps, book="gaussian", size=size, rule="single")


def smallest(pixels: NDArray[np.uint8], codec: str = "webp") -> tuple[bytes, float]:
    """The smallest file of a classic codec over qualities, and its PSNR; the better one of equal size."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    files = [classic_file(picture, codec, quality) for quality in (0, 1, 2, 5, 10)]
    best = min(files, key=lambda file: (len(file), -quality_of(picture, file)))
    return best, quality_of(picture, best)


def mean(values: Sequence[float] | NDArray[Any]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))
