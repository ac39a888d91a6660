"""Text as a flat array of token ids on disk, cut into windows; no token is thrown away.

The documents, each behind a separator, form one stream per split, and window i of length T predicts tokens
i T + 1 to i T + T of it: every token but the first is predicted exactly once, and the last window is padded. Splits
are cut by characters in order: training, then validation, then test.

Ids are kept in a cache outside the user's folders under a key made of content and settings, and are used again
only if both agree and the files are intact.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quintic.assets import corpus_path
from quintic.core import ConfigError, DataError
from quintic.core.files import atomic_folder, cache_dir, sha256_bytes, sha256_file
from quintic.data.config import OWN_TOKENIZERS, DataConfig
from quintic.data.pieces import PIECE, divide, even, take
from quintic.data.readers import EXTENSIONS, find_sources, read_documents
from quintic.data.survey import Documents, take_survey, utf8
from quintic.data.tokenizer import SMALLEST_BPE, Tokenizer, vocab_size_for

__all__ = ["Split", "TokenData", "document_ids", "given_tokenizer", "num_windows", "prepare", "windows"]

FORMAT = 1
SPLITS = ("train", "validation", "test")
MINIMUM_CHARACTERS = 200
_LEARNED_FROM = 1 << 30  # bytes of text at most that a tokenizer is trained on: its memory grows with their words
_LOOKED_AT = 1 << 18  # characters in which special tokens are looked for
_AT_ONCE = 16  # pieces encoded side by side at most; each takes some 50 MB meanwhile


@dataclass(frozen=True)
class Split:
    """One part of the text."""

    ids: NDArray[Any]
    """(tokens,) ids, memory-mapped; every document begins with the separator (and the token that begins a text)."""
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


def prepare(
    paths: Sequence[Path] | None, config: DataConfig, progress: Callable[[str], None] = lambda _: None
) -> TokenData:
    """Read text, train or load a tokenizer, and make or find the ids.

    Args:
        paths: Files and folders; None is the embedded corpus.
        config: Settings.
        progress: Told in words what is going on.

    Raises:
        DataError: The text is missing, unreadable or too short, or the tokenizer cannot be used.
        ConfigError: A separator is named for a tokenizer that has its own.
    """
    source = find_sources([corpus_path()] if paths is None else paths)
    warnings = []
    if source.skipped:
        warnings.append(
            f"passed over {source.skipped} files of other kinds than {', '.join(EXTENSIONS)} (also with .gz); "
            "a file that is named itself is read as text whatever its name" + source.hint
        )

    def documents() -> Iterator[Iterable[str]]:
        return read_documents(source.files, encoding=config.encoding, field=config.field)

    progress(f"reading {len(source.files)} files")
    content = take_survey(source.files, documents, [config.encoding, config.field], progress)
    if content.chars == 0:
        raise DataError(f"no text in {', '.join(map(str, paths or []))}: every document is empty")
    held_out = config.validation_fraction + config.test_fraction
    shares = (1 - held_out, 1 - config.test_fraction, 1)
    cuts = [round(content.chars * share) for share in shares]  # characters at which the splits end
    if cuts[0] and content.chars < MINIMUM_CHARACTERS:
        raise DataError(
            f"the text is too short to train on: {content.chars} characters, at least {MINIMUM_CHARACTERS} are needed"
            + source.hint
        )
    loaded = given_tokenizer(config)
    settings = asdict(config) | {
        "tokenizer": loaded.identity if loaded else config.tokenizer,
        "cross_documents": None,  # does not change the ids
        "encoding": None,  # nor does this, given the text
        "field": None,
    }
    del settings["separator"]  # is in the tokenizer's identity
    if config.special_tokens == "text":
        del settings["special_tokens"]  # the keys are those of before there was this setting
    key = sha256_bytes(json.dumps([FORMAT, content.digest, settings], sort_keys=True).encode())[:32]
    folder = cache_dir("tokens") / key
    data = None
    if folder.exists():
        try:
            data = _load(folder, key, loaded, config.special_tokens, reused=True)
        except DataError as error:
            warnings.append(f"{error}; made the tokens again")
            shutil.rmtree(folder)
    if data is None:
        tokenizer, notes = (loaded, {}) if loaded else _fit_tokenizer(documents, cuts, config, progress)
        tokenizer.special_tokens = config.special_tokens
        _build(folder, key, documents, cuts, tokenizer, notes, progress)
        data = _load(folder, key, loaded, config.special_tokens, reused=False)
    if loaded:
        warnings.extend(_doubts(loaded, config.tokenizer, documents()))
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


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of a file; None if it is to be made here.

    Raises:
        DataError: It cannot be used.
        ConfigError: A separator is named for a tokenizer that has its own.
    """
    if config.tokenizer not in OWN_TOKENIZERS:
        path, special = Path(config.tokenizer), config.special_tokens
        return Tokenizer.load(path, separator=config.separator, special_tokens=special)
    if config.separator:
        raise ConfigError(
            f"data.separator = {config.separator!r} is for a tokenizer.json; data.tokenizer = {config.tokenizer} has a "
            "separator of its own: leave it out"
        )
    return None


def _fit_tokenizer(
    documents: Documents,
    cuts: list[int],
    config: DataConfig,
    progress: Callable[[str], None],
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of the settings, trained on the training split if it is to be trained."""

    def training_text() -> Iterator[str]:
        for piece in even(divide(documents(), cuts)):
            if piece.split:
                return
            yield piece.text

    num_bytes = sum(len(utf8(text)) for text in training_text())
    kind = config.tokenizer
    if kind == "auto":
        kind = "byte" if num_bytes < SMALLEST_BPE and not config.vocab_size else "bpe"
    if kind == "byte":
        small = f", below the {SMALLEST_BPE:,} that a vocabulary of words needs" if config.tokenizer == "auto" else ""
        return Tokenizer.bytes(), {"tokenizer": f"bytes: {num_bytes:,} bytes of training text{small}"}
    size = config.vocab_size or vocab_size_for(num_bytes)
    progress(f"training a tokenizer of {size} tokens")
    every = max(1, -(-num_bytes // _LEARNED_FROM))
    tokenizer = Tokenizer.train(itertools.islice(training_text(), 0, None, every), size)
    why = "as given" if config.vocab_size else f"{num_bytes:,} bytes of training text / 1000, down to a power of two"
    part = f"; learned from one in {every} pieces of the text" if every > 1 else ""
    return tokenizer, {"tokenizer": f"byte-level BPE of {tokenizer.vocab_size} tokens: {why}{part}"}


def _build(
    folder: Path,
    key: str,
    documents: Documents,
    cuts: list[int],
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
        last = [-1] * len(SPLITS)  # ids
        try:
            pieces = even(divide(documents(), cuts))
            while batch := take(pieces, PIECE * min(os.cpu_count() or 1, _AT_ONCE)):
                encoded = tokenizer.encode_batch([piece.text for piece in batch])
                for (split, begins, text), ids in zip(batch, encoded, strict=True):
                    start = tokenizer.opening(ids, last[split]) if begins else []
                    files[split].write(np.asarray(start + ids, dtype=dtype).tobytes())
                    last[split] = (last[split], *start, *ids[-1:])[-1]
                    count = counts[split]
                    count["num_documents"] += begins
                    count["num_tokens"] += len(start) + len(ids)
                    count["num_bytes"] += len(utf8(text))
                    count["num_chars"] += len(text)
                    done += len(text)
                progress(f"tokenizing {done / cuts[-1]:.0%}")
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


def _doubts(tokenizer: Tokenizer, path: str, documents: Iterator[Iterable[str]]) -> list[str]:
    """What the user should know of a tokenizer of others, from the beginning of the text."""
    found = []
    first = "".join(itertools.islice(next(documents), 1))
    if not tokenizer.gives_back(first[:10_000]):
        found.append(f"tokenizer {path} does not give this text back exactly; bits per byte will look too good")
    if tokenizer.special_tokens == "text":
        some = (part for document in itertools.islice(documents, 100) for part in itertools.islice(document, 1))
        if spelt := tokenizer.spells("".join([first, *some])[:_LOOKED_AT]):
            found.append(
                f"the text spells special tokens of {path} ({', '.join(spelt[:3])}), which are read as text; "
                "data.special_tokens=token makes them tokens"
            )
    return found


def _load(folder: Path, key: str, tokenizer: Tokenizer | None, special_tokens: str, *, reused: bool) -> TokenData:
    """Open cached ids; of a tokenizer that was made here the cache has the file.

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
    tokenizer = tokenizer or Tokenizer.load(folder / "tokenizer.json", special_tokens=special_tokens)
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
