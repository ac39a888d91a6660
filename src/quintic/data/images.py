"""Images in, arrays of bytes out, in three splits that share no near copies.

Sources: pictures drawn by the package itself (always there), idx files as of MNIST and Fashion-MNIST, and folders of
image files, whose first level of subfolders names the classes.

Splits: idx files have their own test part, and validation is the end of the training part. A picture file goes where
the CRC-32 of its *group* says, so that adding files moves no other. The group of ``dog_3.png`` is its own name; in a
folder of emoji, named by code points, it is the code points without skin tone and gender, which make near copies.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quintic.core import ConfigError, DataError
from quintic.core.files import PICTURES
from quintic.core.settings import check_names, check_types
from quintic.data.config import check_fractions
from quintic.data.drawings import SHAPES, draw
from quintic.data.picture_reading import Picture, find_pictures, fit, read_picture

__all__ = ["ImageConfig", "ImageData", "ImageSplit", "as_pixels", "as_signed", "image_grid", "prepare_images"]

_IDX = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_CODE_POINTS = re.compile(r"[0-9a-f]{4,5}(-[0-9a-f]{4,5})*", re.IGNORECASE)
_VARIANTS = {"fe0f", "200d", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "2640", "2642", "1f468", "1f469", "1f9d1"}
_DRAWN_SIZE = 32


@dataclass(frozen=True)
class ImageConfig:
    """How pictures become arrays.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    size: int = 0
    """Height and width; others are scaled to cover it and cut at the centre. 0 keeps theirs, which must be equal."""
    channels: str = "auto"
    """grey, rgb, or auto: grey if no picture has a colour."""
    flip: bool = False
    """Whether training images count a second time, mirrored left to right."""
    validation_fraction: float = 0.05
    """Part of the groups (of idx files: end of the training part) that only measures."""
    test_fraction: float = 0.1
    """Part of the groups looked at by quintic evaluate alone, 1 for all; idx files have their own."""
    drawn: int = 4000
    """Training images to draw when no path is given."""

    def __post_init__(self) -> None:
        check_types("data", self)
        check_names("data", self, {"channels": ("auto", "grey", "rgb")})
        if self.size and not 4 <= self.size <= 1024:
            raise ConfigError(f"data.size must be 0 (keep) or between 4 and 1024 pixels, found {self.size}")
        check_fractions(self.validation_fraction, self.test_fraction)
        if not 10 <= self.drawn <= 1_000_000:
            raise ConfigError(f"data.drawn must be between 10 and 1000000, found {self.drawn}")


@dataclass(frozen=True)
class ImageSplit:
    """One part of the images."""

    images: NDArray[np.uint8]
    """(n, h, w, c); c is 1 or 3."""
    labels: NDArray[np.int64] | None
    """(n,) indices of classes."""
    files: tuple[str, ...] = ()
    """Where each image comes from; empty where images have no files of their own."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageData:
    """Prepared images."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    """Empty without labels."""
    fingerprint: str
    """Hash of all pixels, labels and whether images are mirrored."""
    flip: bool = False
    """Whether the training examples include mirror images."""
    notes: dict[str, str] = field(default_factory=dict)
    """How choices came about."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know."""
    licence: str = "not known"
    """Of the pictures: the first line of a file licence.txt beside them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, as models count."""
        _, h, w, c = self.train.images.shape
        return c, h, w

    @property
    def num_examples(self) -> int:
        """Training examples of one epoch."""
        return len(self.train) * (2 if self.flip else 1)

    def examples(self, numbers: NDArray[np.int64]) -> ImageSplit:
        """Training examples by number; those from ``len(train)`` on are mirror images."""
        n = len(self.train)
        images = self.train.images[numbers % n]
        mirrored = numbers >= n
        images[mirrored] = images[mirrored, :, ::-1]
        return ImageSplit(images, None if self.train.labels is None else self.train.labels[numbers % n])


def as_signed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes (n, h, w, c) to float32 (n, c, h, w): 0 becomes -1, 255 becomes 1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def as_pixels(signed: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The inverse of :func:`as_signed`, rounded to the nearest byte and clipped.

    Example:
        >>> every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
        >>> bool((as_pixels(as_signed(every)) == every).all())
        True
    """
    levels = np.floor((signed.astype(np.float64) + 1.0) * 127.5 + 0.5)
    return np.ascontiguousarray(np.clip(levels, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def prepare_images(
    paths: Sequence[Path] | None,
    config: ImageConfig,
    progress: Callable[[str], None] = lambda _: None,
    unreadable: Callable[[DataError], None] | None = None,
) -> ImageData:
    """Read or draw images and split them.

    Args:
        paths: A folder of idx files, or folders and files of pictures; None draws.
        config: Settings.
        progress: Told in words what is going on.
        unreadable: Told of each picture file that cannot be read, which is then left out; None raises what it would
            be told.

    Raises:
        DataError: Images are missing, unreadable (all of them, if some may be), of unequal sizes, or too few for a
            split that was asked for.
    """
    if paths is None:
        return _drawn(config)
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}")
    if len(paths) == 1 and paths[0].is_dir() and any(_IDX.fullmatch(p.name) for p in paths[0].iterdir()):
        return _from_idx(paths[0], config)
    return _from_files(paths, config, progress, unreadable)


def _drawn(config: ImageConfig) -> ImageData:
    size, channels = config.size or _DRAWN_SIZE, 3 if config.channels == "rgb" else 1
    counts = {
        "train": config.drawn,
        "validation": round(config.drawn * config.validation_fraction),
        "test": round(config.drawn * config.test_fraction),
    }
    splits = {name: ImageSplit(*draw(n, size, channels, seed=0, label=name)) for name, n in counts.items()}
    return _finish(splits, SHAPES, config, {"source": "drawn by this package"}, "CC0-1.0")


def _from_idx(folder: Path, config: ImageConfig) -> ImageData:
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _IDX.fullmatch(path.name):
            found.setdefault((match[1], match[2]), path)
    arrays: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for part in ("train", "t10k"):
        for kind in ("images", "labels"):
            if (part, kind) not in found:
                raise DataError(f"{folder} has no {part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte (or with .gz)")
            arrays[part, kind] = _read_idx(found[part, kind], 3 if kind == "images" else 1)
        if len(arrays[part, "images"]) != len(arrays[part, "labels"]):
            raise DataError(
                f"{folder}: {len(arrays[part, 'images'])} {part} images but {len(arrays[part, 'labels'])} labels"
            )
    images = {part: _fit_array(arrays[part, "images"], config) for part in ("train", "t10k")}
    labels = {part: arrays[part, "labels"].astype(np.int64) for part in ("train", "t10k")}
    cut = len(images["train"]) - round(len(images["train"]) * config.validation_fraction)
    splits = {
        "train": ImageSplit(images["train"][:cut], labels["train"][:cut]),
        "validation": ImageSplit(images["train"][cut:], labels["train"][cut:]),
        "test": ImageSplit(images["t10k"], labels["t10k"]),
    }
    count = 1 + max(int(split.max(initial=0)) for split in labels.values())
    names = tuple(str(i) for i in range(count))
    if (listed := folder / "classes.txt").is_file():
        names = tuple(listed.read_text(encoding="utf-8").splitlines())
        if len(names) < count:
            raise DataError(f"{listed} names {len(names)} classes, but the labels go up to {count - 1}")
    notes = {"source": f"idx files of {folder}", "test": "the files' own test part"}
    return _finish(splits, names, config, notes, _licence([folder]))


def _licence(paths: Sequence[Path]) -> str:
    """What the file ``licence.txt`` of each folder says in its first line."""
    said = [path / "licence.txt" for path in paths if (path / "licence.txt").is_file()]
    lines = dict.fromkeys(file.read_text(encoding="utf-8").strip().split("\n")[0] for file in said)
    return "; ".join(lines) or "not known"


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{path} is not an idx file of bytes with {axes} axes; it begins with {data[:4].hex(' ')}")
    shape = struct.unpack(f">{axes}I", data[4:start])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - start != expected:
        raise DataError(
            f"{path} should hold {expected} values, {' x '.join(map(str, shape))}, found {len(data) - start}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _fit_array(images: NDArray[np.uint8], config: ImageConfig) -> NDArray[np.uint8]:
    """(n, h, w) to (n, h', w', c)."""
    if config.size and images.shape[1:] != (config.size, config.size):
        fitted = [np.asarray(fit(Image.fromarray(image), config.size)) for image in images]
        images = np.stack(fitted) if fitted else np.zeros((0, config.size, config.size), np.uint8)
    return np.repeat(images[..., None], 3 if config.channels == "rgb" else 1, axis=3)


def _from_files(
    paths: Sequence[Path],
    config: ImageConfig,
    progress: Callable[[str], None],
    unreadable: Callable[[DataError], None] | None,
) -> ImageData:
    files = find_pictures(paths)
    if not files:
        raise DataError(
            f"no pictures in {', '.join(map(str, paths))}; looked for {' '.join(PICTURES)} there and below, "
            "and for idx files as of MNIST"
        )
    files, read = _read_all(files, config.size, progress, unreadable)
    pictures = [picture.image for picture in read]
    notes = {"source": f"{len(files)} picture files"}
    if several := sum(picture.frames > 1 for picture in read):
        notes["frames"] = f"the first one of each of {several} files that have several"
    if deep := sum(picture.deep for picture in read):
        notes["bits"] = f"{deep} grey files of 16 bits, divided by 257 to have 8"
    grey = config.channels == "grey" or (config.channels == "auto" and all(p.mode == "L" for p in pictures))
    if config.channels == "auto":
        notes["channels"] = "grey, no file has colours" if grey else "rgb, some files have colours"
    sizes = {p.size for p in pictures}
    if len(sizes) > 1:
        some = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
        raise DataError(f"the pictures have {len(sizes)} different sizes ({some} ...); set one, such as data.size=32")
    images = np.stack([np.asarray(p.convert("L" if grey else "RGB")) for p in pictures])
    images = images.reshape(*images.shape[:3], 1 if grey else 3)

    emoji = all(_CODE_POINTS.fullmatch(path.stem) for path, _ in files)
    notes["groups"] = "emoji without skin tone and gender" if emoji else "every file by itself"
    place = np.array([_place(_emoji_group(path.stem) if emoji else path.name) for path, _ in files])
    classes = sorted({name for _, name in files if name is not None})
    labelled = bool(classes) and all(name is not None for _, name in files)
    if labelled:
        notes["classes"] = f"{len(classes)} subfolders"
        labels = np.array([classes.index(str(name)) for _, name in files], dtype=np.int64)
    else:
        labels = None
    is_test, is_validation = place < config.test_fraction, place >= 1.0 - config.validation_fraction
    chosen = {"train": ~is_test & ~is_validation, "validation": is_validation, "test": is_test}
    splits = {
        name: ImageSplit(
            images[which],
            None if labels is None else labels[which],
            tuple(str(path) for (path, _), in_it in zip(files, which, strict=True) if in_it),
        )
        for name, which in chosen.items()
    }
    return _finish(splits, tuple(classes) if labelled else (), config, notes, _licence(paths))


def _read_all(
    files: list[tuple[Path, str | None]],
    size: int,
    progress: Callable[[str], None],
    unreadable: Callable[[DataError], None] | None,
) -> tuple[list[tuple[Path, str | None]], list[Picture]]:
    """Files that can be read, and what is in them."""
    kept, read, problem = [], [], None
    for number, file in enumerate(files):
        if number % 500 == 0:
            progress(f"reading pictures: {number} of {len(files)}")
        try:
            read.append(read_picture(file[0], size))
            kept.append(file)
        except DataError as error:
            if unreadable is None:
                raise
            problem = error
            unreadable(error)
    if problem and not read:
        raise problem
    return kept, read


def _emoji_group(stem: str) -> str:
    """Code points of an emoji without those that make variants; all of them if nothing would be left.

    Example:
        >>> _emoji_group("1f44b-1f3fd"), _emoji_group("1f468-1f3fb")
        ('1f44b', '1f468-1f3fb')
    """
    points = stem.lower().split("-")
    return "-".join(point for point in points if point not in _VARIANTS) or stem.lower()


def _place(group: str) -> float:
    """A number in [0, 1) by name: the decimal digits of the CRC-32 behind the point, last digit first."""
    return int(f"{zlib.crc32(group.encode()):010d}"[::-1]) / 1e10


def _finish(
    splits: dict[str, ImageSplit],
    class_names: Sequence[str],
    config: ImageConfig,
    notes: dict[str, str],
    licence: str,
) -> ImageData:
    if not len(splits["train"]) and config.validation_fraction + config.test_fraction < 1.0:
        raise DataError("no image is left to train on; add images, or lower data.test_fraction")
    warnings = []
    for name, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        if fraction and not len(splits[name]):
            warnings.append(f"too few images for a {name} split: none of {len(splits['train'])} fell into it")
    digest = hashlib.sha256(str(config.flip).encode())
    for name in ("train", "validation", "test"):
        split = splits[name]
        digest.update(f"\0{name}{split.images.shape}".encode())
        digest.update(np.ascontiguousarray(split.images).tobytes())
        digest.update(b"" if split.labels is None else split.labels.astype("<i8").tobytes())
    return ImageData(
        splits["train"],
        splits["validation"],
        splits["test"],
        tuple(class_names),
        digest.hexdigest(),
        config.flip,
        notes,
        warnings,
        licence,
    )


def image_grid(images: NDArray[np.uint8], smallest: int = 512) -> Image.Image:
    """Images side by side, nearly as many rows as columns, magnified by a whole number to be seen.

    Args:
        images: (n, h, w, c).
        smallest: Pixels of width from which nothing is magnified.
    """
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)
    zoom = max(1, -(-smallest // (columns * w)))
    picture = Image.fromarray(sheet[..., 0] if c == 1 else sheet)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
