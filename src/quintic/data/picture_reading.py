"""Picture files: found below folders, and read into 8 bits per channel of sRGB, upright, on white, at one size.

Grey pictures of 16 bits become v / 257, rounded, so that black stays black and white white. (Of colours with 16 bits
Pillow itself keeps the upper 8.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from quintic.core import DataError
from quintic.core.files import PICTURES
from quintic.data.pictures import to_srgb

__all__ = ["Picture", "find_pictures", "fit", "read_picture"]


class Picture(NamedTuple):
    """What was read of a file."""

    image: Image.Image
    """In mode L or RGB."""
    frames: int
    """In the file; the first one was read."""
    deep: bool
    """Whether it had 16 bits of grey."""


def find_pictures(paths: Sequence[Path]) -> list[tuple[Path, str | None]]:
    """Picture files with the name of the first subfolder each lies in, every file once, in sorted order."""
    found: dict[Path, tuple[Path, str | None]] = {}
    for path in paths:
        if path.is_file():
            found.setdefault(path.resolve(), (path, None))
            continue
        for file in sorted(path.rglob("*")):
            parts = file.relative_to(path).parts
            hidden = any(part.startswith(".") for part in parts)
            if file.name.lower().endswith(PICTURES) and not hidden and file.is_file():
                found.setdefault(file.resolve(), (file, parts[0] if len(parts) > 1 else None))
    return list(found.values())


def read_picture(path: Path, size: int = 0) -> Picture:
    """One picture, upright, in sRGB by its colour profile, on white where it is transparent.

    Args:
        path: Its file.
        size: Height and width to scale and cut to; 0 keeps its own.

    Raises:
        DataError: It cannot be read, or has more bits than can be converted without knowing its range.
    """
    try:
        with Image.open(path) as opened:
            # Cameras put other views of the same picture behind it, as MPO.
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            image = ImageOps.exif_transpose(opened)
            if deep := image.mode.startswith("I;16"):
                values, info = np.asarray(image, dtype=np.uint32), image.info
                image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
                image.info["icc_profile"] = info.get("icc_profile")
            if image.mode in ("I", "F"):
                raise DataError(
                    f"it has 32 bits a pixel (mode {image.mode}), whose range is not known; convert it to 8 bits, "
                    "for values from 0 to 1 by PIL.Image.open(old).point(lambda v: 255 * v).convert('L').save(new)"
                )
            coloured = image.mode not in ("1", "L", "LA")
            if image.info.get("icc_profile"):
                if image.has_transparency_data:
                    image = image.convert("RGBA" if coloured else "LA")
                elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
                    image = image.convert("RGB" if coloured else "L")
                image = to_srgb(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if coloured else "L")
            return Picture(fit(image, size) if size else image, frames, deep)
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise DataError(f"cannot read {path} as a picture: {error or type(error).__name__}") from error


def fit(image: Image.Image, size: int) -> Image.Image:
    """Scaled to cover a square and cut at the centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
