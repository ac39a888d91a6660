"""A small exact model, pictures of its kind, and a codec, for tests."""

import functools

import numpy as np
import torch
from PIL import Image

from quintic.codec import Codec
from quintic.core.counter_rng import Stream
from quintic.diffusion import GaussianDenoiser


@functools.cache
def smooth_model(side: int = 12, channels: int = 1, scale: float = 0.15) -> GaussianDenoiser:
    """Gaussian images whose pixels are correlated by 0.9^distance along rows and columns."""
    place = torch.arange(side, dtype=torch.float64)
    rows = 0.9 ** (place[:, None] - place[None, :]).abs()
    covariance = torch.kron(torch.eye(channels, dtype=torch.float64), torch.kron(rows, rows))
    values, vectors = torch.linalg.eigh(scale * covariance)
    return GaussianDenoiser(torch.zeros(channels, side, side), vectors, values.clamp_min(1e-6))


@functools.cache
def toy_codec(side: int = 12, channels: int = 1, **options: object) -> Codec:
    return Codec(smooth_model(side, channels), **options)


def picture(width: int, height: int, mode: str = "L", seed: int = 0) -> Image.Image:
    """Smooth random fields as channels."""
    bands = len(mode)
    noise = Stream(seed, "picture").normal(0, bands * 16).reshape(bands, 4, 4)
    levels = np.clip(128.0 + 50.0 * noise, 0, 255).astype(np.uint8)
    parts = [Image.fromarray(band).resize((width, height), Image.Resampling.BICUBIC) for band in levels]
    return parts[0] if bands == 1 else Image.merge(mode, parts)


def samples(count: int, side: int = 12, seed: int = 0) -> np.ndarray:
    """(count, 1, side, side) images drawn from the model of :func:`smooth_model`."""
    model = smooth_model(side)
    d = side * side
    normal = torch.from_numpy(Stream(seed, "samples").normal(0, count * d).reshape(count, d)).float()
    x = (normal * model._variances.sqrt().float()) @ model._basis.T
    return x.view(count, 1, side, side).numpy()
