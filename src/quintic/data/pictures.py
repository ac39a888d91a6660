"""Pictures of Pillow as screens show them: upright, and in the colours of sRGB.

A picture may bring a colour profile that says what its numbers mean; models and files of this package take them for
sRGB, as everybody does with pictures that say nothing.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image, ImageCms, ImageOps

from quintic.core import DataError

__all__ = ["UNREADABLE", "to_srgb", "upright"]

UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for files that are damaged in one place or another."""

_PLAIN = {"1": "L", "La": "LA", "RGBa": "RGBA", "YCbCr": "RGB", "RGBX": "RGB", "HSV": "RGB"}
_ROUNDING = 3
"""Of 255: profiles of sRGB differ by that much from each other."""
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Spaces of profiles, and Pillow's modes of them."""


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says.

    Raises:
        DataError: Its EXIF data is damaged.
    """
    try:
        return ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise DataError(f"cannot read the picture, or which side of it is up: {error}") from error


def to_srgb(image: Image.Image) -> Image.Image:
    """A picture without a colour profile: if it has another than sRGB, its colours converted.

    Args:
        image: Of any mode but palettes, 8 bits per channel; alpha stays as it is.

    Returns:
        The picture itself if it has no profile, or one that changes colours by hardly more than rounding; else L or LA
        of grey, RGB or RGBA of colours.

    Raises:
        DataError: The profile is damaged, or of other colours than the picture.

    Example:
        >>> plain = Image.new("RGB", (2, 2), (255, 40, 40))
        >>> to_srgb(plain) is plain
        True
    """
    data = image.info.get("icc_profile")
    if not data:
        return image
    try:
        profile: Any = ImageCms.getOpenProfile(io.BytesIO(data))
        plain = image.convert(_PLAIN[image.mode]) if image.mode in _PLAIN else image
        alpha = plain.getchannel("A") if plain.mode in ("LA", "RGBA") else None
        grey = plain.mode in ("L", "LA")
        colours = plain.convert("L" if grey else "RGB") if alpha is not None else plain
        space = _SPACES.get(profile.profile.xcolor_space.strip(), "")
        if grey and space == "RGB":  # the profile of a colour picture that was made grey
            colours = colours.convert("RGB")
        if colours.mode != space:
            raise DataError(f"its colour profile is of {space or 'unknown colours'}, the picture of {colours.mode}")
        to = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
        if space == "RGB" and _nearly_the_same(to):
            return image
        made = ImageCms.applyTransform(colours, to)
    except (*UNREADABLE, ImageCms.PyCMSError) as error:
        said = f"{error}" if isinstance(error, DataError) else f"its colour profile is damaged ({error})"
        raise DataError(f"cannot convert the picture to sRGB: {said}; save it as sRGB, or without a profile") from error
    assert made is not None
    if grey:
        made = made.convert("L")
    if alpha is not None:
        made.putalpha(alpha)
    made.info.pop("icc_profile", None)
    return made


def _nearly_the_same(to: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of colours is that of sRGB to itself: what a profile is called does not tell."""
    steps = (0, 51, 102, 153, 204, 255)
    some = bytes(value for r in steps for g in steps for b in steps for value in (r, g, b))
    told = ImageCms.applyTransform(Image.frombytes("RGB", (len(some) // 3, 1), some), to)
    assert told is not None
    return max(abs(a - b) for a, b in zip(some, told.tobytes(), strict=True)) <= _ROUNDING
