"""Pictures and coded files on the command line: found by name, folder or pattern, opened, and named when written."""

from __future__ import annotations

import glob
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, UserError
from quintic.core.files import check_folder

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["each_file", "find_files", "grey_picture", "open_picture", "png_bytes", "progress", "target_paths"]


def find_files(paths: Iterable[str | Path], suffixes: tuple[str, ...]) -> dict[Path, Path]:
    """Files of these endings that are named, in named folders, or match a pattern; each once.

    Returns:
        Each with its place under ``--out``: below a named folder, or below what a pattern begins with, as it lies
        there. Where two folders have a file of one name, their own names stand before it.

    Raises:
        DataError: Something named is not there.
        ConfigError: Nothing is named.
    """
    found: dict[Path, Path] = {}  # with the folder it was found through
    for text in paths:
        path = root = Path(text)
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.name.lower().endswith(suffixes) and p.is_file()]
            if not inside:
                raise DataError(f"no {' '.join(suffixes)} files in {path}")
        elif path.exists():
            inside, root = [path], path.parent
        else:
            inside = sorted(Path(name) for name in glob.glob(str(text), recursive=True))
            if not inside:
                raise DataError(f"no such file or folder: {text}")
            root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        for each in inside:
            found.setdefault(each, root)
    if not found:
        raise ConfigError("name at least one file, folder or pattern")
    places = {path: path.relative_to(root) for path, root in found.items()}
    roots: dict[Path, set[Path]] = {}
    for path, root in found.items():
        roots.setdefault(places[path], set()).add(root)
    return {path: found[path].name / place if len(roots[place]) > 1 else place for path, place in places.items()}


def target_paths(files: dict[Path, Path], out: Path | None, suffix: str, overwrite: bool) -> list[Path]:
    """Where to write what becomes of each file.

    Args:
        files: From :func:`find_files`.
        out: A file for one, a folder for several; None is beside each. Of two files whose names differ in their
            ending only, the targets keep the old ending before the new one.
        suffix: The new ending.
        overwrite: Whether targets may exist.

    Raises:
        ConfigError: Two have one target, a target exists and may not be replaced, has another ending, or cannot be
            written.
    """
    if out is not None and len(files) == 1 and not out.is_dir() and out.suffix:
        if out.suffix.lower() != suffix:
            raise ConfigError(f"--out {out}: expected a name that ends in {suffix}, or a folder")
        targets = [out]
    else:
        long = [path if out is None else out / place for path, place in files.items()]
        short = [path.with_suffix(suffix) for path in long]
        often = Counter(short)
        pairs = zip(long, short, strict=True)
        targets = [brief if often[brief] == 1 else path.with_name(path.name + suffix) for path, brief in pairs]
    by_target: dict[Path, Path] = {}
    for path, target in zip(files, targets, strict=True):
        if (other := by_target.setdefault(target, path)) != path:
            raise ConfigError(f"{other} and {path} would both become {target}; rename one, or give them apart")
    if same := next((t for t, path in zip(targets, files, strict=True) if t == path), None):
        raise ConfigError(f"{same} has the ending of what is made, {suffix}; name what it is made of, or another --out")
    if not overwrite and (there := next((t for t in targets if t.exists()), None)):
        raise ConfigError(f"{there} exists; --overwrite replaces it")
    for folder in {target.parent for target in targets}:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    return targets


def open_picture(path: Path) -> Image.Image:
    """A picture as the codec takes it, see :func:`quintic.codec.tiles.read_image`; of several frames the first.

    That there are others is said on standard error.

    Raises:
        DataError: It cannot be read, or has more than 8 bits per channel.
    """
    from PIL import Image

    from quintic.codec.tiles import read_image
    from quintic.data.pictures import UNREADABLE

    try:
        with Image.open(path) as opened:
            # Cameras put other views of the same picture behind it, as MPO.
            if (frames := getattr(opened, "n_frames", 1)) > 1 and opened.format != "MPO":
                say(f"{path} has {frames} frames; only the first one is taken", console=Console(stderr=True))
            opened.load()
            return read_image(opened)[0]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as a picture: {error}") from error


def grey_picture(path: Path) -> Image.Image:
    """A picture in mode L: a mask, or weights.

    Raises:
        DataError: As of :func:`open_picture`.
    """
    return open_picture(path).convert("L")


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def progress(items: list[Any], words: str) -> Iterable[Any]:
    """The items, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    if len(items) < 2 or not console.is_terminal:
        return items
    return track(items, words, console=console, transient=True)


def each_file(items: list[tuple[Path, ...]], action: Callable[..., None], words: str, failure: str) -> None:
    """Do something with every file; one that fails is named on standard error and does not stop the others.

    Args:
        items: Arguments of the action, the file first.
        action: Raises a user error where it fails.
        words: What is going on.
        failure: How to say that some failed, behind "2 of 3".

    Raises:
        DataError: Some failed.
        UserError: The only one failed.
    """
    failed = 0
    for item in progress(items, words):
        try:
            action(*item)
        except UserError as error:
            named = str(error) if str(item[0]) in str(error) else f"{item[0]}: {error}"
            if len(items) == 1:
                raise type(error)(named) from error
            failed += 1
            say(named, console=Console(stderr=True))
    if failed:
        raise DataError(f"{failed} of {len(items)} {failure}")
