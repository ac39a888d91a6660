"""Settings of text data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quintic.core import ConfigError
from quintic.core.settings import check_names, check_types

__all__ = ["OWN_TOKENIZERS", "DataConfig", "check_fractions"]

OWN_TOKENIZERS = ("auto", "byte", "bpe")
"""Those that are made here; anything else is the path of a file."""


@dataclass(frozen=True)
class DataConfig:
    """How text becomes tokens.

    Raises:
        ConfigError: A value is out of range; the message names the field.
    """

    tokenizer: str = "auto"
    """auto (byte for small text, else bpe), byte, bpe, or the path of a tokenizer.json."""
    separator: str = ""
    """Token of a tokenizer.json that divides documents; empty takes the end of a text that the files beside it name."""
    special_tokens: str = "text"
    """What text that spells a special token, such as <|im_end|>, becomes: text, or token, for conversations written out
    for a model that knows these tokens. With token a separator in the text begins a document too."""
    vocab_size: int = 0
    """Tokens of a trained tokenizer; 0 follows the amount of training text, about 1,000 bytes a token."""
    encoding: str = "auto"
    """auto (byte order mark, else UTF-8) or any codec of Python, such as gb18030 or utf-16."""
    field: str = "text"
    """Field of a JSON line that holds the text; or several in a text around them, such as "{prompt}\\n{response}"."""
    validation_fraction: float = 0.05
    """Part of the text, before the test part, that only measures; in order of the characters."""
    test_fraction: float = 0.05
    """Last part of the text, looked at by quintic evaluate alone."""
    cross_documents: bool = True
    """Whether attention may look into an earlier document of the same window."""

    def __post_init__(self) -> None:
        check_types("data", self)
        check_names("data", self, {"special_tokens": ("text", "token")})
        if escape := re.search(r"\\[nt]", self.field):
            raise ConfigError(
                f"data.field has a backslash and a letter ({escape[0]}) where a line end or a tab was meant; put "
                "double quotes within single ones: 'data.field=\"{prompt}\\n{response}\"'"
            )
        if self.vocab_size and not 257 <= self.vocab_size <= 1 << 20:
            raise ConfigError(
                f"data.vocab_size must be 0 (by size of the text) or between 257 and {1 << 20}, found {self.vocab_size}"
            )
        check_fractions(self.validation_fraction, self.test_fraction)


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Refuse a part of the data below 0 or above all of it, and two that are more than all together.

    Raises:
        ConfigError: One is not between 0 and 1, or together they are more than all.
    """
    for name, part in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= part <= 1.0:
            raise ConfigError(f"data.{name} must be between 0 and 1, found {part}")
    if validation_fraction + test_fraction > 1.0:
        raise ConfigError(
            "data.validation_fraction and data.test_fraction add up to more than 1: "
            f"{validation_fraction} + {test_fraction}"
        )
