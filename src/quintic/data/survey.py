"""Hash and length of a text, which are all that is known of it before it is cut.

Reading hundreds of gigabytes at every start, on every rank, would take long: what was found is noted in the cache, for
files whose sizes and times are still the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from quintic.core import DataError
from quintic.core.files import atomic_write, cache_dir, sha256_bytes

__all__ = ["Documents", "Survey", "take_survey", "utf8"]

_FORMAT = 1
_SETTLED = 2_000_000_000  # nanoseconds: the coarsest clock of a file system
_TOLD_EVERY = 1 << 24  # characters

Documents = Callable[[], Iterator[Iterable[str]]]
"""Reads the documents from their beginning, each an iterable of its parts that can be gone through again."""


class Survey(NamedTuple):
    """What reading a text finds out."""

    digest: str
    """SHA-256 of the documents: of each its length in bytes of UTF-8, and these bytes."""
    chars: int
    """Characters."""


def take_survey(
    files: Sequence[Path], documents: Documents, how: Sequence[str], progress: Callable[[str], None]
) -> Survey:
    """Hash and length of the documents of files; of files that have not changed since the last time, as noted then.

    Args:
        files: Where the documents come from.
        documents: Reads them.
        how: Everything else that they depend on.
        progress: Told in words what is going on.

    Raises:
        DataError: A file cannot be read.
    """
    stamps = [_stamp(file) for file in files]
    key = sha256_bytes(json.dumps([_FORMAT, stamps, *how]).encode())[:32]
    note = cache_dir("texts") / f"{key}.json"
    begun = time.time_ns()
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return Survey(str(noted["digest"]), int(noted["chars"]))
    except (OSError, ValueError, KeyError, TypeError):
        found = _read_through(documents, progress)
    # A file may be written twice within a tick of its clock: what has just changed is not noted.
    if all(begun - changed > _SETTLED for *_, changed in stamps) and stamps == [_stamp(file) for file in files]:
        atomic_write(note, json.dumps(found._asdict()))
    return found


def _stamp(file: Path) -> tuple[str, int, int, int]:
    """Name, size, time of the last change of the content, and of any change."""
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    return str(file.resolve()), found.st_size, found.st_mtime_ns, max(found.st_mtime_ns, found.st_ctime_ns)


def _read_through(documents: Documents, progress: Callable[[str], None]) -> Survey:
    digest, chars, told = hashlib.sha256(), 0, 0
    for document in documents():
        digest.update(sum(len(utf8(text)) for text in document).to_bytes(8, "little"))
        for text in document:
            digest.update(utf8(text))
            chars += len(text)
        if chars - told > _TOLD_EVERY:
            told = chars
            progress(f"read {chars / 1e6:,.0f} million characters")
    return Survey(digest.hexdigest(), chars)


def utf8(text: str) -> bytes:
    """The bytes of a text; also of one with halves of surrogate pairs, which some encodings let pass."""
    return text.encode("utf-8", "surrogatepass")
