"""Tokenizers: byte-level BPE trained on the user's text, plain bytes, or any ``tokenizer.json``.

Training and running are the ``tokenizers`` library's. Byte level means that any text, in any script, goes to tokens
and back exactly. One separator token stands before every document, and behind it the token that begins a text, where
a foreign tokenizer has one of its own for that. Text that spells such a token stays text, unless it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from quintic.core import DataError
from quintic.core.files import atomic_write, sha256_bytes
from quintic.data.tokenizer_files import Declared, declared, for_context

__all__ = ["SEPARATOR", "SMALLEST_BPE", "StreamDecoder", "Tokenizer", "vocab_size_for"]

SEPARATOR = "<|endoftext|>"
_USUAL_SEPARATORS = (SEPARATOR, "</s>", "<|im_end|>", "<eos>", "[EOS]", "<|end_of_text|>", "[SEP]")
_LONGEST_WORD = 1000
SMALLEST_BPE = 64_000  # bytes of text below which a trained vocabulary would only memorise


def vocab_size_for(num_bytes: int) -> int:
    """Vocabulary for an amount of training text: about 1,000 bytes a token, a power of two in [512, 32768].

    Example:
        >>> vocab_size_for(1_084_000), vocab_size_for(100), vocab_size_for(10**9)
        (1024, 512, 32768)
    """
    size = 512
    while size < 32768 and 2 * size * 1000 <= num_bytes:
        size *= 2
    return size


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: A tokenizer of the ``tokenizers`` library.
        origin: For messages.
        known: What the folder it comes from says.
        separator: Token that divides documents; empty takes what is known, or the one token of a usual name.
        special_tokens: ``text``, or ``token``: whether text that spells a special token stays text or becomes it.

    Raises:
        DataError: It has no token that could separate documents, or several and nothing says which.
    """

    def __init__(
        self,
        backend: HFTokenizer,
        origin: str = "tokenizer",
        *,
        known: Declared | None = None,
        separator: str = "",
        special_tokens: str = "text",
    ) -> None:
        self._backend = backend
        self._known = known = known or Declared()
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = special_tokens
        guessed = "" if separator or known.end else _guessed_separator(backend, origin)
        self.separator: str = separator or known.end or guessed
        source = "data.separator" if separator else known.source
        self.separator_id: int = _id_of(backend, self.separator, origin, source)
        self.begin_id: int = _id_of(backend, known.begin or self.separator, origin, "bos_token")
        """What a text begins with: the separator, if there is no token for that."""
        self.end_ids: tuple[int, ...] = tuple(
            dict.fromkeys((self.separator_id, *(i for i in known.stops if backend.id_to_token(i) is not None)))
        )
        """Where a generated text is over."""
        # Ids may have holes; the model needs a row for the largest.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} ids, separator {self.separator!r})"

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 bytes and the separator."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {SEPARATOR: 0} | {symbol: index for index, symbol in enumerate(alphabet, start=1)}
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens([SEPARATOR])
        return cls(backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with ``vocab_size`` tokens, the separator among them."""
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator((part for text in texts for part in _cut_long_words(text)), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path, *, separator: str = "", special_tokens: str = "text") -> Tokenizer:
        """Read a ``tokenizer.json`` and the files of :mod:`quintic.data.tokenizer_files` beside it.

        Args:
            path: The file.
            separator: As for the class.
            special_tokens: As for the class.

        Raises:
            DataError: The file is missing or is no tokenizer, or one beside it is damaged.
        """
        backend = _read(path)
        added = backend.get_added_tokens_decoder().items()
        known = declared(path.parent, {number: token.content for number, token in added if token.special}.get)
        return cls(backend, str(path), known=known, separator=separator, special_tokens=special_tokens)

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``, readable by Hugging Face tools, and the files that it came with beside it."""
        for name, content in self._known.files.items():
            atomic_write(path.with_name(name), content)
        atomic_write(path, self._backend.to_str(pretty=True))

    def files(self, context: int) -> dict[str, str]:
        """{name: content} of a folder for transformers.

        A tokenizer that came from such a folder is as it was there. Any other names its separator for the beginning,
        the end and the padding of texts, and puts it before every text, as :func:`quintic.lm.generate_text` does.

        Args:
            context: Longest sequence of the model.
        """
        found = for_context(self._known.files, context)
        ends = {"bos_token_id": self.begin_id, "eos_token_id": self.separator_id, "pad_token_id": self.separator_id}
        found.setdefault("generation_config.json", json.dumps(ends, indent=2) + "\n")
        backend = HFTokenizer.from_str(self._backend.to_str())
        if "tokenizer_config.json" not in found:
            table = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **dict.fromkeys(("bos_token", "eos_token", "pad_token"), self.separator),
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"],
            }
            found["tokenizer_config.json"] = json.dumps(table, indent=2) + "\n"
            if backend.post_processor is None:
                begin = {"id": "begin", "ids": [self.separator_id], "tokens": [self.separator]}
                backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
                    single="begin $A", pair="begin $A begin:1 $B:1", special_tokens=[begin]
                )
        return {**found, "tokenizer.json": backend.to_str(pretty=True)}

    @property
    def special_tokens(self) -> str:
        """``text`` or ``token``: what text that spells a special token becomes."""
        return "text" if self._backend.encode_special_tokens else "token"

    @special_tokens.setter
    def special_tokens(self, value: str) -> None:
        self._backend.encode_special_tokens = value == "text"

    @property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's content."""
        return sha256_bytes(self._backend.to_str().encode())

    @property
    def identity(self) -> str:
        """What ids of a text follow from: :attr:`hash`, and how documents are divided unless the vocabulary tells."""
        plain = self.begin_id == self.separator_id and _candidates(self._backend)[:1] == [self.separator]
        return self.hash if plain else sha256_bytes(f"{self.hash} {self.separator_id} {self.begin_id}".encode())

    def spells(self, text: str) -> list[str]:
        """The special tokens that a text spells."""
        tokens = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in tokens if token.special and token.content in text]

    def fits(self, path: Path | None) -> bool:
        """Whether every token has the same id in a ``tokenizer.json``, or in the tokenizer of bytes.

        Raises:
            DataError: The file is missing or is no tokenizer.
        """
        other = Tokenizer.bytes()._backend if path is None else _read(path)
        mine, theirs = (backend.get_vocab(with_added_tokens=True) for backend in (self._backend, other))
        return all(theirs.get(token) == number for token, number in mine.items())

    def gives_back(self, text: str) -> bool:
        """Whether a text comes back from its ids exactly."""
        return self._backend.decode(self.encode(text), skip_special_tokens=False) == text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, by all processors."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def opening(self, ids: Sequence[int], after: int = -1) -> list[int]:
        """What stands before a document in a stream.

        Args:
            ids: Of the document, which may have its special tokens written out.
            after: The id before it.
        """
        found = [self.separator_id]
        if self.special_tokens == "token" and after == self.separator_id:
            found.pop()
        if self.begin_id != self.separator_id:
            found.append(self.begin_id)
        if found and self.special_tokens == "token" and list(ids[:1]) == [self.begin_id]:
            found.pop()
        return found

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, from the beginning of a document on."""
        ids = self.encode(text)
        return ids if self.special_tokens == "token" and ids[:1] == [self.begin_id] else [self.begin_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that form no character become U+FFFD.

        Separators are left out, and so are all special tokens that text cannot spell.
        """
        if self.special_tokens == "text":
            return self._backend.decode(list(ids), skip_special_tokens=True)
        unseen = (self.separator_id, self.begin_id)
        return self._backend.decode([i for i in ids if i not in unseen], skip_special_tokens=False)


class StreamDecoder:
    """Text of ids that come one by one, a whole character at a time.

    Example:
        >>> tokenizer = Tokenizer.bytes()
        >>> decoder = StreamDecoder(tokenizer)
        >>> [decoder.push(i) for i in tokenizer.encode("né")]
        ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Add an id and return the text that has become certain."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < 8:
            return ""  # the bytes of a character may still be coming
        new = text[len(self._shown) :]
        # Keep the last token as context: some decoders treat a text's first token in a way of its own.
        self._ids = self._ids[-1:]
        self._shown = self._tokenizer.decode(self._ids)
        return new


def _cut_long_words(text: str) -> Iterator[str]:
    """A text in parts, cut within words of more than 1,000 characters: the time of training is quadratic in them."""
    start = 0
    if max(map(len, text.split()), default=0) > _LONGEST_WORD:
        for long in re.finditer(rf"\S{{{_LONGEST_WORD}}}", text):
            yield text[start : long.end()]
            start = long.end()
    yield text[start:]


def _read(path: Path) -> HFTokenizer:
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}; give auto, byte, bpe or the path of a tokenizer.json")
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error


def _candidates(backend: HFTokenizer) -> list[str]:
    """Tokens of a vocabulary that by their names may separate documents."""
    return [token for token in _USUAL_SEPARATORS if backend.token_to_id(token) is not None]


def _guessed_separator(backend: HFTokenizer, origin: str) -> str:
    """The token that separates documents, where nothing says which."""
    found = _candidates(backend)
    if found[:1] == [SEPARATOR] or len(found) == 1:
        return found[0]
    what = f"{origin} has {'several tokens' if found else 'no token'} to separate documents with"
    which = f" ({', '.join(found)}), and no file beside it says which" if found else ""
    usual = ", ".join(_USUAL_SEPARATORS)
    expected = "" if found else f"; expected one of {usual}, or a tokenizer_config.json beside it"
    raise DataError(f"{what}{which}{expected}; name one with data.separator=TOKEN")


def _id_of(backend: HFTokenizer, token: str, origin: str, source: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise DataError(f"{origin} has no token {token!r}, which {source} names; expected one of its vocabulary")
    return number


def _byte_level(model: models.BPE) -> HFTokenizer:
    backend = HFTokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend
