"""Text from files: plain text, markdown, JSON lines, each also gzipped; one document per file or JSON line.

Nothing is guessed silently: bytes that do not decode, binary content and broken JSON are errors that name the file
and the place.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quintic.core import DataError

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


@dataclass(frozen=True)
class Source:
    """The files that were found."""

    files: list[Path]
    skipped: int
    """Files in folders with another extension."""


def find_sources(paths: Iterable[Path]) -> Source:
    """Files of the given files and folders, in order; folders are searched recursively in sorted order.

    Hidden files and folders are passed over, and a file that is reached twice is taken once. A file named
    directly is taken whatever its extension.

    Raises:
        DataError: A path is missing or unreadable, or a folder holds no text.
    """
    found: dict[Path, Path] = {}
    skipped = 0
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}")
        if not path.is_dir():
            found.setdefault(path.resolve(), path)
            continue
        inside = 0
        for file in _walk(path):
            if not _known(file):
                skipped += 1
                continue
            inside += 1
            found.setdefault(file.resolve(), file)
        if not inside:
            raise DataError(
                f"folder {path} holds no text; looked for {', '.join(EXTENSIONS)} (also with .gz) in it and below"
                + (f", found {skipped} other files; name a file directly to read it as text" if skipped else "")
            )
    return Source(list(found.values()), skipped)


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(root, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _known(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(EXTENSIONS)


def read_documents(files: Iterable[Path], *, encoding: str = "auto", field: str = "text") -> Iterator[str]:
    """Yield the documents of files, in order; empty ones are left out.

    Args:
        files: As found by :func:`find_sources`.
        encoding: ``auto`` takes a byte order mark, else UTF-8; or a codec's name.
        field: Of JSON lines.

    Raises:
        DataError: A file is unreadable, binary, undecodable or not the JSON lines that its name promises.
    """
    if encoding != "auto":
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise DataError(
                f"unknown encoding {encoding!r}; use auto or the name of a Python codec, such as utf-8, gb18030, utf-16"
            ) from error
    for path in files:
        text = _decode(path, _read_bytes(path), encoding)
        if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
            documents: Iterable[str] = _json_lines(path, text, field)
        else:
            documents = (text,)
        yield from (document for document in documents if document.strip())


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if data[:2] == b"\x1f\x8b":
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file: {error}") from error
    if path.name.lower().endswith(".gz"):
        raise DataError(f"{path} is named .gz but is not a gzip file")
    return data


def _decode(path: Path, data: bytes, encoding: str) -> str:
    if encoding == "auto":
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    if b"\0" in data[:8192] and not encoding.lower().startswith(_WIDE):
        raise DataError(
            f"{path} looks binary (it has zero bytes); give text files, or data.encoding=utf-16 if that is what it is"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {error.encoding} text: byte {data[error.start]:#04x} at offset {error.start}; "
            f"name its encoding, for example data.encoding={_fitting(data, encoding)}"
        ) from error


def _fitting(data: bytes, tried: str) -> str:
    """A common encoding in which the bytes do decode."""
    for name in ("utf-8", "gb18030", "big5", "shift_jis", "cp1252"):
        if name != tried:
            with contextlib.suppress(UnicodeDecodeError):
                data.decode(name)
                return name
    return "latin-1"


def _json_lines(path: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg}); .jsonl needs one JSON object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: expected a JSON object with a field {field!r}, found {line[:40]!r}")
        if field not in value:
            strings = [key for key, entry in value.items() if isinstance(entry, str)]
            advice = f"; choose one with data.field={strings[0]}" if strings else ""
            fields = ", ".join(map(repr, value))
            raise DataError(f"{path}:{number}: no field {field!r}; the fields are {fields}{advice}")
        if not isinstance(value[field], str):
            raise DataError(f"{path}:{number}: field {field!r} is not text but {type(value[field]).__name__}")
        yield value[field]
