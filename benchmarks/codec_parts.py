"""What the codec's benchmark measures with: images, models, a classifier of its own, the smallest WebP files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks.fetch_data import fetch
from quintic.codec.chain import aim, run_chain
from quintic.codec.comparison import classic_file, quality_of
from quintic.codec.models import Model, as_model
from quintic.codec.schedule import Plan, atoms_that_fit, matched_levels, preset_plan
from quintic.data.images import ImageConfig, ImageData, as_signed, prepare_images
from quintic.diffusion import GaussianDenoiser

SETS = {"fashion28": ("fashion-mnist", ImageConfig()), "emoji32": ("emoji", ImageConfig(size=32, channels="rgb"))}
BATCH = 50


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
    return run_chain(model.denoiser, plan, len(x), choose, batch=BATCH)


def standard(model: Model, bits: int, preset: int = 1) -> Plan:
    return preset_plan(preset, model.curve, model.dimension, atoms_that_fit(preset, model.dimension, bits))


def single_matched(model: Model, steps: int, size: int) -> Plan:
    """One atom of a Gaussian codebook a step as in the paper, at matched levels."""
    levels = matched_levels(model.curve, [size.bit_length() - 1] * steps, 60)
    return Plan(levels, (1,) * steps, book="gaussian", size=size, rule="single")


def smallest_webp(pixels: NDArray[np.uint8]) -> tuple[bytes, float]:
    """The smallest file over qualities, and its PSNR; the better one of equal size."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    files = [classic_file(picture, "webp", quality) for quality in (0, 1, 2, 5, 10)]
    best = min(files, key=lambda file: (len(file), -quality_of(picture, file)))
    return best, quality_of(picture, best)


class Classifier(nn.Module):
    """Two convolutions and two layers; ``features`` is what Frechet distances are taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def features(self, signed: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.no_grad():
            return self.body(torch.from_numpy(signed)).double().numpy()

    def labels(self, signed: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.no_grad():
            return self.head(self.body(torch.from_numpy(signed))).argmax(1).numpy()


def classifier(data: ImageData, path: Path, steps: int = 1500) -> Classifier:
    """Trained on the training images, or read from ``path``."""
    torch.manual_seed(0)
    net = Classifier()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    assert data.train.labels is not None
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    draws = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1.0 - step / steps)
        rows = draws.integers(len(data.train), size=128)
        x, y = torch.from_numpy(as_signed(data.train.images[rows])), torch.from_numpy(data.train.labels[rows])
        optimizer.zero_grad()
        F.cross_entropy(net.head(net.body(x)), y).backward()
        optimizer.step()
    torch.save(net.state_dict(), path)
    return net.eval()


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Distance of Gaussians fitted to two sets of features."""
    mean_a, mean_b, cov_a, cov_b = a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def mean(values: Sequence[float] | NDArray[Any]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))
