"""An own classifier of small images: labels, and features for Frechet distances (nobody else's, so not an "FID")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from quintic.data.images import ImageData, as_signed

_BATCH, _STEPS, _PASSES = 128, 1500, 15


class Classifier(nn.Module):
    """Two convolutions and two layers; ``features`` is what Frechet distances are taken in.

    Args:
        shape: (channels, height, width) of the images; height and width are multiples of four.
        classes: To tell apart.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def features(self, signed: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.no_grad():
            return self.body(torch.from_numpy(signed)).double().numpy()

    def labels(self, signed: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.no_grad():
            return self.head(self.body(torch.from_numpy(signed))).argmax(1).numpy()


def classifier(data: ImageData, path: Path) -> Classifier:
    """Trained on the training images, at most fifteen times each, or read from ``path``."""
    torch.manual_seed(0)
    net = Classifier(data.shape, len(data.class_names))
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    assert data.train.labels is not None
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    draws = np.random.default_rng(0)
    steps = min(_STEPS, _PASSES * len(data.train) // _BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1.0 - step / steps)
        rows = draws.integers(len(data.train), size=_BATCH)
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
