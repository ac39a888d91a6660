"""Drawn pictures: ten labelled shapes in any number, from nothing but a seed.

A shape is where a distance d(x, y) is negative; the share of a pixel inside it is clip(1/2 - d, 0, 1) with d in
pixels, so that edges are smooth. Place, size, turn and the two shades are random (:mod:`quintic.core.counter_rng`).
Only +, -, *, / and square roots are used (a turn by t is ((1 - t^2), 2 t) / (1 + t^2)), which every platform rounds
alike: image i of a stream is the same bytes everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quintic.core.counter_rng import Stream

__all__ = ["SHAPES", "draw"]

SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "pair", "crescent", "corner")

_Plane = NDArray[np.float64]
_NUMBERS = 11  # random numbers per image


def draw(count: int, size: int, channels: int, *, seed: int, label: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw shapes.

    Args:
        count: Number of images; image i does not depend on it.
        size: Height and width in pixels.
        channels: 1 or 3.
        seed: Any integer.
        label: Which stream of images, e.g. the name of a split.

    Returns:
        (count, size, size, channels) images and (count,) indices into :data:`SHAPES`.

    Example:
        >>> images, labels = draw(20, 16, 1, seed=0, label="example")
        >>> images.shape, SHAPES[labels[0]], SHAPES[labels[11]]
        ((20, 16, 16, 1), 'disc', 'ring')
    """
    numbers = Stream(seed, "drawings", label).uniform(0, count * _NUMBERS).reshape(count, _NUMBERS)
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    images = np.empty((count, size, size, channels), dtype=np.uint8)
    y, x = (np.arange(size, dtype=np.float64) + 0.5 for _ in range(2))
    for i in range(count):
        across, down, large, turn, quadrant = numbers[i, :5]
        radius = size * (0.2 + 0.2 * large)
        t = 2.0 * turn - 1.0  # a turn within a right angle to either side
        cos, sin = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
        if quadrant < 0.5:
            cos, sin = -cos, -sin
        dx = (x - size * (0.35 + 0.3 * across))[None, :] / radius
        dy = (y - size * (0.35 + 0.3 * down))[:, None] / radius
        distance = _distance(SHAPES[labels[i]], cos * dx + sin * dy, cos * dy - sin * dx) * radius
        inside = np.clip(0.5 - distance, 0.0, 1.0)[:, :, None]
        back, front = numbers[i, 5:8], numbers[i, 8:11]
        # The shades stay apart, or there would be nothing to see.
        back, front = 0.45 * back[:channels], 0.55 + 0.45 * front[:channels]
        images[i] = np.floor(255.0 * (back + (front - back) * inside) + 0.5).astype(np.uint8)
    return images, labels


def _distance(shape: str, u: _Plane, v: _Plane) -> _Plane:
    """Distance to the edge in radii, negative inside; u and v are coordinates in radii."""
    a, b = np.abs(u), np.abs(v)
    if shape == "disc":
        return np.sqrt(u * u + v * v) - 1.0
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(a, b) - 0.85
    if shape == "frame":
        return np.abs(np.maximum(a, b) - 0.7) - 0.2
    if shape == "triangle":
        return np.maximum(0.8660254037844386 * a - 0.5 * v, v) - 0.55
    if shape == "cross":
        return np.minimum(np.maximum(a - 1.0, b - 0.3), np.maximum(a - 0.3, b - 1.0))
    if shape == "bar":
        return np.maximum(a - 1.1, b - 0.3)
    if shape == "pair":
        return np.maximum(a - 1.0, np.abs(b - 0.55) - 0.25)
    if shape == "crescent":
        return np.maximum(np.sqrt(u * u + v * v) - 1.0, 0.85 - np.sqrt((u - 0.5) * (u - 0.5) + v * v))
    assert shape == "corner"
    return np.minimum(np.maximum(np.abs(u + 0.7) - 0.3, b - 1.0), np.maximum(a - 1.0, np.abs(v - 0.7) - 0.3))
