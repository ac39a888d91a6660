"""Text as a flat array of token ids on disk, cut into windows; no token is thrown away.

The documents, each behind a separator, form one stream per split, and window i of length T predicts tokens
i T + 1 to i T + T of it: every token but the first is predicted exactly once, and the last window is padded. Splits
are cut by characters in order: training, then validation, then test.

Ids are kept in a cache outside the user's folders under a key made of content and settings, and are used again
only if both agree and the files are intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quintic.assets import corpus_path
from quintic.core import DataError
from quintic.core.files import atomic_folder, cache_dir, sha256_bytes, sha256_file
from quintic.data.config import DataConfig
from quintic.data.readers import EXTENSIONS, find_sources, read_documents
from quintic.data.tokenizer import SMALLEST_BPE, Tokenizer, vocab_size_for

__all__ = ["Split", "TokenData", "document_ids", "num_windows", "prepare", "windows"]

FORMAT = 1
SPLITS = ("train", "validation", "test")
MINIMUM_CHARACTERS = 200
_PIECE = 1 << 20  # characters encoded at a time


@dataclass(frozen=True)
class Split:
    """One part of the text."""

    ids: NDArray[Any]
    """(tokens,) ids, memory-mapped; every document begins with the separator."""
    num_bytes: int
    """UTF-8 bytes of the text, separators not counted."""
    num_chars: int
    """Characters of the text."""
    num_documents: int
    """Documents that reach into this part."""

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return len(self.ids)


@dataclass(frozen=True)
class TokenData:
    """Prepared text."""

    train: Split
    validation: Split
    test: Split
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of text, order, settings and tokenizer."""
    folder: Path
    """Where the ids are cached."""
    reused: bool
    """Whether the cache had them already."""
    notes: dict[str, str] = field(default_factory=dict)
    """How derived numbers came about."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know."""


@dataclass
class _Content:
    """What the first pass over the text finds out."""

    digest: str
    chars: int
    cuts: list[int]
    """Character positions where the splits end."""


def prepare(
    paths: Sequence[Path] | None, config: DataConfig, progress: Callable[[str], None] = lambda _: None
) -> TokenData:
    """Read text, train or load a tokenizer, and make or find the ids.

    Args:
        paths: Files and folders; None is the embedded corpus.
        config: Settings.
        progress: Told in words what is going on.

    Raises:
        DataError: The text is missing, unreadable or too short.
    """
    source = find_sources([corpus_path()] if paths is None else paths)
    warnings = []
    if source.skipped:
        warnings.append(
            f"passed over {source.skipped} files of other kinds than {', '.join(EXTENSIONS)} (also with .gz); "
            "a file that is named itself is read as text whatever its name"
        )

    def documents() -> Iterator[str]:
        return read_documents(source.files, encoding=config.encoding, field=config.field)

    progress(f"reading {len(source.files)} files")
    content = _survey(documents(), config)
    if content.chars == 0:
        raise DataError(f"no text in {', '.join(map(str, paths or []))}: every document is empty")
    if content.cuts[0] and content.chars < MINIMUM_CHARACTERS:
        raise DataError(
            f"the text is too short to train on: {content.chars} characters, at least {MINIMUM_CHARACTERS} are needed"
        )
    foreign = config.tokenizer not in ("auto", "byte", "bpe")
    loaded = Tokenizer.load(Path(config.tokenizer)) if foreign else None
    settings = asdict(config) | {
        "tokenizer": loaded.hash if loaded else config.tokenizer,
        "cross_documents": None,  # does not change the ids
        "encoding": None,  # nor does this, given the text
        "field": None,
    }
    key = sha256_bytes(json.dumps([FORMAT, content.digest, settings], sort_keys=True).encode())[:32]
    folder = cache_dir("tokens") / key
    data = None
    if folder.exists():
        try:
            data = _load(folder, key, reused=True)
        except DataError as error:
            warnings.append(f"{error}; made the tokens again")
            shutil.rmtree(folder)
    if data is None:
        tokenizer, notes = (loaded, {}) if loaded else _fit_tokenizer(documents, content, config, progress)
        _build(folder, key, documents, content, tokenizer, notes, progress)
        data = _load(folder, key, reused=False)
    if loaded:
        sample = next(iter(documents()))[:10_000]
        if loaded.decode(loaded.encode(sample)) != sample:
            warnings.append(
                f"tokenizer {config.tokenizer} does not give this text back exactly; bits per byte will look too good"
            )
    data.warnings.extend(warnings)
    return data


def num_windows(split: Split, context: int) -> int:
    """Windows of ``context`` predictions that cover a split."""
    return -(-max(0, split.num_tokens - 1) // context)


def windows(split: Split, numbers: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets of some windows.

    Args:
        split: Where from.
        numbers: (b,) window numbers.
        context: T.

    Returns:
        Two (b, T) int64 arrays; targets are -1 (and inputs 0) past the end of the stream.
    """
    place = np.asarray(numbers, dtype=np.int64)[:, None] * context + np.arange(context + 1)
    last = split.num_tokens - 1
    ids = split.ids[np.minimum(place, last)].astype(np.int64)
    inside = place[:, 1:] <= last
    return np.where(place[:, :-1] <= last, ids[:, :-1], 0), np.where(inside, ids[:, 1:], -1)


def document_ids(inputs: NDArray[np.int64], separator_id: int) -> NDArray[np.int64]:
    """Number of the document that each position of a window belongs to; a separator begins its document.

    Example:
        >>> document_ids(np.array([[5, 0, 7, 7, 0]]), separator_id=0)
        array([[0, 1, 1, 1, 2]])
    """
    return np.cumsum(inputs == separator_id, axis=1)


def _survey(documents: Iterator[str], config: DataConfig) -> _Content:
    digest, chars = hashlib.sha256(), 0
    for text in documents:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        chars += len(text)
    held_out = config.validation_fraction + config.test_fraction
    cuts = [round(chars * (1 - held_out)), round(chars * (1 - config.test_fraction)), chars]
    return _Content(digest.hexdigest(), chars, cuts)


def _parts(documents: Iterator[str], cuts: list[int]) -> Iterator[tuple[int, str]]:
    """(split number, text) of every piece of a document, in order; a cut inside a document makes two."""
    position, split = 0, 0
    for text in documents:
        start = 0
        while start < len(text):
            while position >= cuts[split]:
                split += 1
            end = min(len(text), start + cuts[split] - position)
            yield split, text[start:end]
            position += end - start
            start = end


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of about a megabyte, cut behind line ends where there are any."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            for mark in ("\n", " "):
                if (cut := text.rfind(mark, start, end)) >= start:
                    # A space belongs to the word behind it.
                    end = cut + 1 if mark == "\n" else max(cut, start + 1)
                    break
        yield text[start:end]
        start = end


def _fit_tokenizer(
    documents: Callable[[], Iterator[str]],
    content: _Content,
    config: DataConfig,
    progress: Callable[[str], None],
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of the settings, trained on the training split if it is to be trained."""

    def training_text() -> Iterator[str]:
        for split, text in _parts(documents(), content.cuts):
            if split:
                return
            yield from _pieces(text)

    num_bytes = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in training_text())
    kind = config.tokenizer
    if kind == "auto":
        kind = "byte" if num_bytes < SMALLEST_BPE and not config.vocab_size else "bpe"
    if kind == "byte":
        small = f", below the {SMALLEST_BPE:,} that a vocabulary of words needs" if config.tokenizer == "auto" else ""
        return Tokenizer.bytes(), {"tokenizer": f"bytes: {num_bytes:,} bytes of training text{small}"}
    size = config.vocab_size or vocab_size_for(num_bytes)
    progress(f"training a tokenizer of {size} tokens")
    tokenizer = Tokenizer.train(training_text(), size)
    why = "as given" if config.vocab_size else f"{num_bytes:,} bytes of training text / 1000, down to a power of two"
    return tokenizer, {"tokenizer": f"byte-level BPE of {tokenizer.vocab_size} tokens: {why}"}


def _build(
    folder: Path,
    key: str,
    documents: Callable[[], Iterator[str]],
    content: _Content,
    tokenizer: Tokenizer,
    notes: dict[str, str],
    progress: Callable[[str], None],
) -> None:
    """Encode everything into ``folder``; a folder that another process finished meanwhile is kept."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = [{"num_bytes": 0, "num_chars": 0, "num_documents": 0, "num_tokens": 0} for _ in SPLITS]
    mine = folder.with_name(f"{folder.name}-{os.getpid()}")
    with atomic_folder(mine) as temporary:
        files = [(temporary / f"{name}.bin").open("wb") for name in SPLITS]
        done = 0
        try:
            for split, text in _parts(documents(), content.cuts):
                count = counts[split]
                count["num_documents"] += 1
                for number, piece in enumerate(_pieces(text)):
                    ids = tokenizer.encode(piece)
                    if number == 0:
                        ids = [tokenizer.separator_id, *ids]
                    files[split].write(np.asarray(ids, dtype=dtype).tobytes())
                    count["num_tokens"] += len(ids)
                    count["num_bytes"] += len(piece.encode("utf-8", "surrogatepass"))
                    count["num_chars"] += len(piece)
                    done += len(piece)
                    progress(f"tokenizing {done / content.chars:.0%}")
        finally:
            for file in files:
                file.close()
        tokenizer.save(temporary / "tokenizer.json")
        manifest = {
            "format": FORMAT,
            "key": key,
            "dtype": dtype.str,
            "splits": dict(zip(SPLITS, counts, strict=True)),
            "notes": notes,
            "sha256": {file.name: sha256_file(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    try:
        mine.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(mine)


def _load(folder: Path, key: str, *, reused: bool) -> TokenData:
    """Open cached ids.

    Raises:
        DataError: Something is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        intact = manifest["format"] == FORMAT and manifest["key"] == key
        intact = intact and all(sha256_file(folder / name) == value for name, value in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cached tokens in {folder} are damaged") from error
    if not intact:
        raise DataError(f"cached tokens in {folder} are damaged")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    splits = {}
    for name, count in manifest["splits"].items():
        tokens = count.pop("num_tokens")
        # An empty file cannot be mapped.
        ids = np.memmap(folder / f"{name}.bin", manifest["dtype"], "r", shape=(tokens,)) if tokens else np.zeros(0)
        splits[name] = Split(ids, **count)
    return TokenData(
        **splits,
        tokenizer=tokenizer,
        fingerprint=sha256_bytes(f"{key} {tokenizer.hash}".encode())[:32],
        folder=folder,
        reused=reused,
        notes=manifest["notes"],
    )
