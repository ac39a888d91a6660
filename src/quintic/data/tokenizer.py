"""Tokenizers: byte-level BPE trained on the user's text, plain bytes, or any ``tokenizer.json``.

Training and running are the ``tokenizers`` library's. Byte level means that any text, in any script, goes to tokens
and back exactly. One separator token stands before every document; text that spells it stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from quintic.core import DataError
from quintic.core.files import atomic_write, sha256_bytes

__all__ = ["SEPARATOR", "SMALLEST_BPE", "StreamDecoder", "Tokenizer", "vocab_size_for"]

SEPARATOR = "<|endoftext|>"
_FOREIGN_SEPARATORS = (SEPARATOR, "</s>", "<|im_end|>", "<eos>", "[EOS]", "<|end_of_text|>", "[SEP]")
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

    Raises:
        DataError: It has no token that could separate documents.
    """

    def __init__(self, backend: HFTokenizer, origin: str = "tokenizer") -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        # Text that spells a special token is text.
        backend.encode_special_tokens = True
        ids = {token: backend.token_to_id(token) for token in _FOREIGN_SEPARATORS}
        known = [(token, number) for token, number in ids.items() if number is not None]
        if not known:
            raise DataError(
                f"{origin} has no token to separate documents with; expected one of {', '.join(_FOREIGN_SEPARATORS)}"
            )
        self.separator: str
        self.separator_id: int
        self.separator, self.separator_id = known[0]
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
    def load(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            DataError: The file is missing or is no tokenizer.
        """
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}; give auto, byte, bpe or the path of a tokenizer.json")
        try:
            return cls(HFTokenizer.from_file(str(path)), str(path))
        except DataError:
            raise
        except Exception as error:  # the library raises a bare Exception
            raise DataError(f"{path} is not a tokenizer.json: {error}") from error

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``, readable by Hugging Face tools."""
        atomic_write(path, self._backend.to_str(pretty=True))

    @property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's content."""
        return sha256_bytes(self._backend.to_str().encode())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, by all processors."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; separators are left out, bytes that form no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


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


def _byte_level(model: models.BPE) -> HFTokenizer:
    backend = HFTokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend
