"""Any picture as images of the size that a model has, and back.

A picture becomes *planes*, a plane becomes tiles. With a grey model: grey is one plane; colour is three, luma and, at
half the resolution, two of chroma (full-range BT.601); transparency is one more. With a colour model: colour is one
plane of three channels; grey and transparency are planes whose channels are equal.

Planes that are smaller than a tile, or do not end with one, are continued, which has no weight for the encoder; larger
ones have tiles that overlap by an eighth, where they are faded into each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quintic.codec.container import MODES
from quintic.core import CodecError, ConfigError, DataError
from quintic.data.pictures import to_srgb, upright

__all__ = ["Layout", "check_roi", "read_image", "to_image", "to_values"]

Plane = NDArray[np.float32]
Beyond = Literal["symmetric", "constant"]
_CONVERTED = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB", "RGBX": "RGB", "La": "LA"}


def read_image(image: Image.Image) -> tuple[Image.Image, int]:
    """An upright picture in a mode that can be coded, its colours those of sRGB, and the number of that mode.

    Raises:
        DataError: It is no picture, has more than 8 bits per channel or no pixels, or is damaged.
    """
    if not isinstance(image, Image.Image):
        raise DataError(
            f"expected a picture of Pillow, found {type(image).__name__}; Image.open reads a file, Image.fromarray "
            "takes an array"
        )
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"pictures of mode {image.mode} have more than 8 bits per channel; convert it to 8 bits first")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("1", "L", "RGB") and image.has_transparency_data:  # one colour that stands for nothing
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    image = to_srgb(image)
    image = image.convert(_CONVERTED.get(image.mode, image.mode))
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if image.mode not in MODES:
        raise DataError(f"cannot code pictures of mode {image.mode}; convert it to L, LA, RGB or RGBA")
    if min(image.size) < 1:
        raise DataError(f"the picture has no pixels: {image.width} x {image.height}")
    opaque = image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255)
    return image, MODES.index(image.mode) + (2 if opaque else 0)


def check_roi(roi: NDArray[np.float64], image: Image.Image) -> NDArray[np.float64]:
    """Weights (height, width) of the pixels of a picture, of mean 1.

    Raises:
        ConfigError: Another shape, or weights that are not positive.
    """
    weights = np.asarray(roi, dtype=np.float64)
    if weights.shape != (image.height, image.width) or not np.isfinite(weights).all() or not (weights > 0).all():
        raise ConfigError(
            f"roi must be positive weights of shape ({image.height}, {image.width}), found {weights.shape}"
        )
    return weights / weights.mean()


def to_values(image: Image.Image) -> NDArray[np.float64]:
    """(height, width, channels) in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1)
    return pixels.astype(np.float64) / 127.5 - 1.0


def to_image(values: NDArray[np.float64], mode: str) -> Image.Image:
    """The inverse of :func:`to_values`, rounded and clipped."""
    pixels = np.clip(np.floor((values + 1.0) * 127.5 + 0.5), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), mode)


@dataclass(frozen=True)
class Layout:
    """How a picture of some size and mode is laid out in tiles of a model.

    Raises:
        CodecError: The model has neither one channel nor three.
    """

    width: int
    height: int
    mode: int
    """Index into :data:`quintic.codec.container.MODES`."""
    tile: tuple[int, int, int]
    """(channels, height, width) of the model."""

    def __post_init__(self) -> None:
        if self.tile[0] not in (1, 3):
            raise CodecError(f"pictures need a model of 1 or 3 channels, this one has {self.tile[0]}")

    @property
    def transparent(self) -> bool:
        """Whether the last plane is alpha."""
        return self.mode in (2, 3)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each plane."""
        full, half = (self.height, self.width), ((self.height + 1) // 2, (self.width + 1) // 2)
        planes = [full]
        if MODES[self.mode].startswith("RGB") and self.tile[0] == 1:
            planes += [half, half]
        return planes + ([full] if self.transparent else [])

    @property
    def count(self) -> int:
        """Tiles of all planes."""
        return sum(math.prod(self._grid(*size)) for size in self.sizes)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, columns = (
            1 if length <= side else 1 + -(-(length - side) // (side - side // 8))
            for length, side in ((height, self.tile[1]), (width, self.tile[2]))
        )
        return rows, columns

    def split(self, values: NDArray[np.floating], beyond: Beyond = "symmetric") -> Plane:
        """(height, width, channels of the mode) in [-1, 1] to tiles (count, c, h, w): a linear map.

        Beyond the picture they are its reflection, or with ``constant`` 0.
        """
        planes = self._planes(values.astype(np.float64))
        return np.concatenate([self._cut(plane, beyond) for plane in planes]).astype(np.float32)

    def split_map(self, weights: NDArray[np.float64], colours: NDArray[np.float64] | float = 1.0) -> Plane:
        """A map (height, width) of weights to tiles, the same for every plane, but for another factor of colours.

        What tiles have beyond the picture weighs nothing: a model may put there what it likes. Where tiles overlap each
        has the square root of its share in the picture, between caring for all of it and for its share alone.
        """
        c = self.tile[0]
        maps = [weights * colours] * len(self.sizes)
        if self.transparent:
            maps[-1] = weights
        planes = [
            m if size == (self.height, self.width) else _half(m) for m, size in zip(maps, self.sizes, strict=True)
        ]
        tiles = [self._cut(np.repeat(p[None], c, axis=0), "constant") * np.sqrt(self._shares(p.shape)) for p in planes]
        return np.concatenate(tiles).astype(np.float32)

    def merge(self, tiles: Plane) -> NDArray[np.float64]:
        """Tiles to values (height, width, channels of the mode), about in [-1, 1]."""
        planes, first = [], 0
        for size in self.sizes:
            count = math.prod(self._grid(*size))
            planes.append(self._join(tiles[first : first + count].astype(np.float64), size))
            first += count
        colour, alpha = planes, []
        if self.transparent:
            colour, alpha = planes[:-1], [_equal(planes[-1])]
        elif self.mode in (4, 5):
            alpha = [np.ones((1, self.height, self.width))]
        if not MODES[self.mode].startswith("RGB"):
            colour = [_equal(colour[0])]
        elif self.tile[0] == 1:
            colour = [_to_rgb(colour, self.height, self.width)]
        return np.concatenate([*colour, *alpha]).transpose(1, 2, 0)

    def _planes(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        c = self.tile[0]
        channels = values.transpose(2, 0, 1)
        alpha = [np.repeat(channels[-1:], c, axis=0)] if self.transparent else []
        if not MODES[self.mode].startswith("RGB"):
            return [np.repeat(channels[:1], c, axis=0), *alpha]
        if c == 3:
            return [channels[:3], *alpha]
        r, g, b = channels[:3]
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        chroma = [_half((other - luma) * scale)[None] for other, scale in ((b, 0.5 / 0.886), (r, 0.5 / 0.701))]
        return [luma[None], *chroma, *alpha]

    def _cut(self, plane: NDArray[np.float64], beyond: Beyond) -> NDArray[np.float64]:
        _, h, w = self.tile
        rows, columns = self._grid(*plane.shape[1:])
        corners = self._corners(rows, columns)
        missing = [h + corners[-1][0] - plane.shape[1], w + corners[-1][1] - plane.shape[2]]
        padded = np.pad(plane, ((0, 0), (0, missing[0]), (0, missing[1])), mode=beyond)
        return np.stack([padded[:, y : y + h, x : x + w] for y, x in corners])

    def _join(self, tiles: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
        c, h, w = self.tile
        rows, columns = self._grid(*size)
        if rows == columns == 1:
            return tiles[0][:, : size[0], : size[1]]
        weight, weights = self._weights(rows, columns)
        total = np.zeros((c, *weights.shape))
        for tile, (y, x) in zip(tiles, self._corners(rows, columns), strict=True):
            total[:, y : y + h, x : x + w] += weight * tile
        return (total / weights)[:, : size[0], : size[1]]

    def _shares(self, size: tuple[int, ...]) -> NDArray[np.float64]:
        """What tiles contribute to each value of a plane (height, width): (tiles, 1, h, w)."""
        _, h, w = self.tile
        grid = self._grid(*size)
        weight, weights = self._weights(*grid)
        return np.stack([weight / weights[None, y : y + h, x : x + w] for y, x in self._corners(*grid)])

    def _weights(self, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a tile (h, w), and their sums where tiles overlap."""
        _, h, w = self.tile
        weight = _ramp(h)[:, None] * _ramp(w)
        weights = np.zeros((h + (rows - 1) * (h - h // 8), w + (columns - 1) * (w - w // 8)))
        for y, x in self._corners(rows, columns):
            weights[y : y + h, x : x + w] += weight
        return weight, weights

    def _corners(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Where tiles begin."""
        _, h, w = self.tile
        return [(i * (h - h // 8), j * (w - w // 8)) for i in range(rows) for j in range(columns)]


def _ramp(side: int) -> NDArray[np.float64]:
    overlap = side // 8
    place = np.arange(side)
    return np.minimum(1.0, (1 + np.minimum(place, place[::-1])) / (overlap + 1.0))


def _half(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of 2 x 2 pixels, odd edges repeated."""
    even = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="edge")
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4.0


def _equal(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """One channel of a plane whose channels should be equal: their mean."""
    return plane if len(plane) == 1 else ((plane[0] + plane[1] + plane[2]) / 3.0)[None]


def _to_rgb(planes: list[NDArray[np.float64]], height: int, width: int) -> NDArray[np.float64]:
    luma = planes[0][0]
    blue, red = (p[0].repeat(2, axis=0).repeat(2, axis=1)[:height, :width] * 2.0 for p in planes[1:])
    b, r = luma + blue * 0.886, luma + red * 0.701
    g = (luma - 0.299 * r - 0.114 * b) / 0.587
    return np.stack([r, g, b])
