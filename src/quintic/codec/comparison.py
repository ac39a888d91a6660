"""Rate and distortion against the codecs of Pillow, by the real sizes of files: headers count on both sides."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, features

from quintic.codec.image import Codec
from quintic.codec.rate import psnr
from quintic.codec.tiles import read_image
from quintic.core import ConfigError

__all__ = ["CLASSIC", "Rate", "classic_codecs", "classic_file", "compare", "rates_table"]

CLASSIC = ("jpeg", "webp", "avif")
_QUALITIES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80)


@dataclass(frozen=True)
class Rate:
    """One setting of one codec on all pictures."""

    codec: str
    setting: str
    bytes: float
    """Mean size of a file."""
    psnr: float
    """Mean in dB; of pictures that came back exactly, 100."""
    pictures: int


def classic_codecs() -> list[str]:
    """Those of :data:`CLASSIC` that this Pillow can write."""
    return [name for name in CLASSIC if features.check("jpg" if name == "jpeg" else name)]


def classic_file(picture: Image.Image, codec: str, quality: int) -> bytes:
    """The smallest file that Pillow writes at a quality.

    Args:
        picture: Mode L, RGB, LA or RGBA; JPEG gets it without transparency.
        codec: jpeg, webp or avif.
        quality: 0 to 100.
    """
    buffer = io.BytesIO()
    if codec == "jpeg":
        plain = picture.convert("L" if picture.mode in ("L", "LA") else "RGB")
        plain.save(buffer, "JPEG", quality=max(1, quality), optimize=True)
    elif codec == "webp":
        picture.save(buffer, "WEBP", quality=quality, method=6)
    else:
        picture.save(buffer, "AVIF", quality=quality, speed=0)
    return buffer.getvalue()


def quality_of(picture: Image.Image, data: bytes) -> float:
    """PSNR of a classic file, in the mode of the picture; 100 if it is exact."""
    with Image.open(io.BytesIO(data)) as opened:
        return min(100.0, psnr(picture, opened.convert(picture.mode)))


def compare(
    codec: Codec, pictures: Iterable[Image.Image], sizes: Sequence[int], *, name: str = "quintic"
) -> list[Rate]:
    """Code pictures at several sizes with this codec, and at several qualities with the classic ones.

    Args:
        codec: The codec.
        pictures: Any; their EXIF orientation is applied.
        sizes: Bytes to aim at.
        name: Of the codec in the rows.

    Raises:
        ConfigError: A size that a picture cannot be coded in.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for each in pictures:
        picture, _ = read_image(each)
        for size in sizes:
            made = codec.code(picture, target_bytes=size)
            found.setdefault((name, f"{size} bytes"), []).append((len(made.data), min(100.0, made.psnr)))
        for other in classic_codecs():
            for quality in _QUALITIES:
                data = classic_file(picture, other, quality)
                pair = len(data), quality_of(picture, data)
                found.setdefault((other, f"quality {quality}"), []).append(pair)
    if not found:
        raise ConfigError("there is no picture to compare on")
    rows = []
    for (which, setting), pairs in found.items():
        size, quality = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        rows.append(Rate(which, setting, size, quality, len(pairs)))
    return rows


def rates_table(rows: Sequence[Rate]) -> str:
    """Markdown."""
    lines = ["| codec | setting | mean bytes | mean PSNR |", "|---|---|---|---|"]
    lines += [f"| {r.codec} | {r.setting} | {r.bytes:.1f} | {r.psnr:.2f} dB |" for r in rows]
    return "\n".join(lines)
