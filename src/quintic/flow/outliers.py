"""How unlike the training images an image is.

A flow gives simple images a high density whether it knows them or not: plain surfaces are likely under any model of
images (Nalisnick et al. 2019). What counts is the code length beyond that of a codec that knows no kind of image
(Serra et al. 2020, "Input complexity and out-of-distribution detection with likelihood-based generative models"):

    score = bits per dimension of the flow - bits per dimension of PNG

Low, mostly below 0, is familiar. It is a log-likelihood ratio, per number of the image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from quintic.core import DataError
from quintic.core.settings import check_counts
from quintic.flow.tarflow import TarFlow

__all__ = ["ImageScores", "png_bits_per_dim", "score_images"]


@dataclass(frozen=True)
class ImageScores:
    """One number per image each."""

    bits_per_dim: NDArray[np.float64]
    outlier: NDArray[np.float64]
    """Higher is stranger."""


def png_bits_per_dim(image: NDArray[np.uint8]) -> float:
    """Bits of an optimised PNG per number of the image (h, w, c), header included."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG", optimize=True)
    return 8.0 * len(file.getvalue()) / image.size


@torch.no_grad()
def score_images(
    model: TarFlow,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    batch: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> ImageScores:
    """Bits per dimension and outlier score of every image.

    Args:
        model: Trained with uniform noise for an honest code length; with gaussian noise the scores still order images.
        images: (n, h, w, c).
        labels: (n,) classes; None is "no label".
        samples: Draws of the dequantisation noise.
        seed: Of that noise.
        batch: Images at a time.
        progress: Told images done and wanted.

    Raises:
        ConfigError: ``samples`` or ``batch`` is no whole number of 1 or more, or the weights are in half precision.
        DataError: Images of another shape than the flow's, or labels of another number than images.
    """
    check_counts(samples=samples, batch=batch)
    if images.ndim != 4 or (labels is not None and labels.shape != (len(images),)):
        told = "" if labels is None else f" with labels (n,), found {labels.shape}"
        raise DataError(f"expected images (n, h, w, c), found {images.shape}{told}")
    found = np.empty(len(images))
    for start in range(0, len(images), batch):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch].transpose(0, 3, 1, 2)))
        rows = None if labels is None else torch.from_numpy(labels[start : start + batch])
        values = model.bits_per_dim(part, rows, samples=samples, seed=seed, first=start)
        found[start : start + batch] = values.cpu().numpy()
        if progress:
            progress(start + len(part), len(images))
    return ImageScores(found, found - np.array([png_bits_per_dim(image) for image in images]))
