"""Text from files: plain text, markdown, JSON, each also gzipped; one document per file or entry of a JSON file.

Nothing is guessed silently: bytes that do not decode, binary content and broken JSON are errors that name the file
and the place. A text is read in parts and JSON lines one by one, so that a file may be larger than the memory; an array
of JSON is read whole.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from quintic.core import DataError
from quintic.core.files import PICTURES
from quintic.data.json_text import json_file, json_lines

__all__ = ["EXTENSIONS", "Source", "find_sources", "read_documents"]

EXTENSIONS = (".txt", ".text", ".md", ".markdown", ".jsonl")
"""What is looked for in folders; each also with ``.gz`` behind it."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WIDE = ("utf-16", "utf-32", "utf16", "utf32")
_GZIP = b"\x1f\x8b"
_PDF = b"%PDF-"
_PARQUET = b"PAR1"
_HEAD = 8192
"""Bytes by which binary files are told from text."""
_PART = 1 << 20
"""Characters or bytes of a file that are read at a time."""


@dataclass(frozen=True)
class Source:
    """The files that were found."""

    files: list[Path]
    skipped: int
    """Files in folders with another extension, and links there that lead nowhere."""
    hint: str = ""
    """What to do with them, if they are pictures."""


def find_sources(paths: Iterable[Path]) -> Source:
    """Files of the given files and folders, in order; folders are searched recursively in sorted order.

    Hidden files and folders are passed over, links are followed, and a file that is reached twice is taken once. A
    file named directly is taken whatever its extension.

    Raises:
        DataError: A path is missing or unreadable, or a folder holds no text.
    """
    found: dict[Path, Path] = {}
    skipped: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}")
        if not path.is_dir():
            found.setdefault(path.resolve(), path)
            continue
        inside, others = 0, []
        for file in _walk(path):
            if not _known(file) or not file.exists():
                others.append(file)
                continue
            inside += 1
            found.setdefault(file.resolve(), file)
        if not inside:
            raise DataError(
                f"folder {path} holds no text; looked for {', '.join(EXTENSIONS)} (also with .gz) in it and below"
                + (f", found {len(others)} other files; name a file directly to read it as text" if others else "")
                + _for_pictures(others)
            )
        skipped += others
    return Source(list(found.values()), len(skipped), _for_pictures(skipped))


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}")

    searched: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in searched:  # by a link, perhaps to a folder above
            folders.clear()
            continue
        searched.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(root, name)
            if not name.startswith(".") and (file.is_file() or file.is_symlink()):
                yield file


def _known(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(EXTENSIONS)


def read_documents(files: Iterable[Path], *, encoding: str = "auto", field: str = "text") -> Iterator[Iterable[str]]:
    """Yield the documents of files, in order; empty ones are left out.

    A document is an iterable of its parts, in order, and can be gone through again: a line of JSON is one part, a
    text file is read a megabyte at a time.

    Args:
        files: As found by :func:`find_sources`.
        encoding: ``auto`` takes a byte order mark, else UTF-8; or a codec's name.
        field: Of JSON; or several in a text of one's own, each between braces: ``{title}: {body}``.

    Raises:
        DataError: A file is unreadable, binary, undecodable or not the JSON lines that its name promises; for a text
            perhaps only where its parts are read.
    """
    if encoding != "auto":
        try:
            "a".encode(encoding)  # codecs.lookup knows some that are none of text, such as hex
        except LookupError as error:
            raise DataError(
                f"unknown encoding {encoding!r}; use auto or the name of a Python codec, such as utf-8, gb18030, utf-16"
            ) from error
    for path in files:
        name = path.name.lower().removesuffix(".gz")
        documents: Iterable[Iterable[str]] = (_TextFile(path, encoding),)
        if name.endswith(".jsonl"):
            documents = ((text,) for text in json_lines(path, _lines(path, encoding), field))
        elif name.endswith(".json"):
            documents = ((text,) for text in json_file(path, _lines(path, encoding), field))
        yield from (document for document in documents if any(part.strip() for part in document))


@dataclass(frozen=True)
class _TextFile:
    """A file as one document."""

    path: Path
    encoding: str

    def __iter__(self) -> Iterator[str]:
        with _opened(self.path, self.encoding) as text:
            while part := text.read(_PART):
                yield part


def _lines(path: Path, encoding: str) -> Iterator[str]:
    with _opened(path, encoding) as text:
        yield from text


@contextlib.contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    """The text of a file.

    Raises:
        DataError: The file cannot be read, is damaged or binary, or does not decode.
    """
    with _binary(path) as data:
        name = _encoding(path, data.read(_HEAD), encoding)
        data.seek(0)
        try:
            yield io.TextIOWrapper(data, name, newline="\n")
        except UnicodeDecodeError as error:
            found = _undecodable(path, name)
            assert found is not None
            raise DataError(
                f"{path} is not {error.encoding} text: byte {found[1]:#04x} at offset {found[0]}; "
                f"name its encoding, for example data.encoding={_fitting(path, name)}"
            ) from error


@contextlib.contextmanager
def _binary(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Raises:
        DataError: The file cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            zipped = _is_gzip(path, file.read(2))
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _is_gzip(path: Path, start: bytes) -> bool:
    """Whether a file is compressed, by its first two bytes.

    Raises:
        DataError: Its name says so and they do not.
    """
    if start == _GZIP:
        return True
    if path.name.lower().endswith(".gz"):
        raise DataError(f"{path} is named .gz but is not a gzip file")
    return False


def _encoding(path: Path, head: bytes, encoding: str) -> str:
    """The encoding of a file, by its mark where it is not given.

    Raises:
        DataError: The file is binary.
    """
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding == "auto":
        encoding = marked or "utf-8"
    elif (name := codecs.lookup(encoding).name) in ("utf-16", "utf-32") and marked != name:
        encoding = f"{name}-{sys.byteorder[0]}e"  # without a mark, a stream has to be told
    if head.startswith(_PDF):
        raise DataError(f"{path} is a PDF; give its text, as pdftotext or a PDF viewer's export makes it")
    if head.startswith(_PARQUET):
        raise DataError(
            f"{path} is a Parquet file; give its rows as JSON lines, as made by pandas: "
            'pandas.read_parquet(FILE).to_json("rows.jsonl", orient="records", lines=True)'
        )
    if b"\0" in head and not encoding.lower().startswith(_WIDE):
        raise DataError(
            f"{path} looks binary (it has zero bytes); give text files, or data.encoding=utf-16 if that is what it is"
            + _for_pictures([path])
        )
    return encoding


def _for_pictures(files: Iterable[Path]) -> str:
    """What to do with pictures, if there are any among the files."""
    some = any(file.name.lower().endswith(PICTURES) for file in files)
    return "; for pictures take --task tarflow or --task ddpm" if some else ""


def _undecodable(path: Path, encoding: str) -> tuple[int, int] | None:
    """Offset and value of the first byte that does not decode; None if all do."""
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    with _binary(path) as data:
        while True:
            block = data.read(_PART)
            done += len(block)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # what it was given, with what it held back, ends where the block ends
                return done - len(error.object) + error.start, error.object[error.start]
            if not block:
                return None


def _fitting(path: Path, tried: str) -> str:
    """A common encoding in which the file does decode."""
    names = [name for name in ("utf-8", "gb18030", "big5", "shift_jis", "cp1252") if name != tried]
    return next((name for name in names if _undecodable(path, name) is None), "latin-1")
