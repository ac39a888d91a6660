"""Files that are either whole or absent: write beside, flush to the disk, rename.

A reader never sees half a file: ``atomic_write`` and ``atomic_folder`` build under a temporary name in
the same folder, ``fsync`` the content, rename in one step and ``fsync`` the parent folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from quintic.core.errors import ConfigError

__all__ = [
    "PICTURES",
    "atomic_folder",
    "atomic_write",
    "cache_dir",
    "check_folder",
    "check_name",
    "fsync_path",
    "make_readable",
    "sha256_bytes",
    "sha256_file",
]

CACHE_VARIABLE = "QUINTIC_CACHE"
_BEGINNING = 60  # characters, at most four bytes each

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Names of pictures end so."""


def cache_dir(*parts: str) -> Path:
    """Folder for things that can be made again (tokens, measured speeds); created if absent.

    ``$QUINTIC_CACHE`` if set, else the platform's cache folder. Deleting it is always safe.

    Raises:
        ConfigError: It cannot be made.
    """
    if root := os.environ.get(CACHE_VARIABLE):
        base = Path(root).expanduser()
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "quintic"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quintic"
    folder = base.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set {CACHE_VARIABLE} to one that can"
        ) from error
    return folder


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Make sure that files can be written into a folder, which need not exist yet: before the work, not after it.

    Raises:
        ConfigError: Something else has its name, or there is no permission.
    """
    ancestor = Path(folder).absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ConfigError(f"{ancestor} is a file, expected a folder; choose another --out")
    if not os.access(ancestor, os.W_OK):
        raise ConfigError(f"no permission to write in {ancestor}; choose another --out")


def check_name(path: str | os.PathLike[str]) -> None:
    """Make sure that a name can be written into the records of a run, which are UTF-8.

    Raises:
        ConfigError: It holds other bytes.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the name {name!a} is not UTF-8 text, as records of a run are; rename it") from error


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder entry to the disk. Folders cannot be opened on Windows: no-op there."""
    path = Path(path)
    if os.name == "nt":
        if path.is_dir():
            return
        # Windows flushes only handles that may write.
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_readable(path: str | os.PathLike[str]) -> None:
    """Make a file as readable as open() would: safetensors makes private ones.

    What that is a file beside it tells. To ask for the umask is to change it, in all threads: a file that another one
    made meanwhile would be open to everybody.
    """
    beside = f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"
    with open(beside, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    os.unlink(beside)
    os.chmod(path, mode)


def _temporary(name: str) -> str:
    """``NAME.xxxxxxxx.tmp``, of a long name its beginning: one of 255 bytes, the most there may be, leaves no room."""
    return f"{name[:_BEGINNING]}.{secrets.token_hex(4)}.tmp"


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that it holds the old content or the new, never a part.

    A file that exists keeps its permissions, and a link stays one: what it points at is written.

    Args:
        path: Target; its folder must exist.
        data: Bytes, or text to be written as UTF-8 with ``\\n`` line ends.

    Raises:
        OSError: The disk is full or the folder is not writable; the old file is untouched.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f".{_temporary(target.name)}")
    try:
        file = open(temporary, "xb")  # noqa: SIM115 (closed below)
    except OSError as error:
        error.filename = str(path)  # rather than a name that nobody has chosen
        raise
    try:
        with file:
            with contextlib.suppress(FileNotFoundError):  # before there is anything to read
                os.chmod(temporary, os.stat(target).st_mode & 0o777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_path(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder under a name of its own, ``NAME.xxxxxxxx.tmp``, flush every file, then rename it to ``NAME``.

    If the body raises, nothing remains. What a killed process leaves behind nobody takes for the folder, and nobody
    deletes here: another one of that name may be somebody's own.

    Args:
        path: Target folder; must not exist.

    Yields:
        The temporary folder to write into.

    Raises:
        FileExistsError: The target exists.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    temporary = path.with_name(_temporary(path.name))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                make_readable(file)
            fsync_path(file)
        fsync_path(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
