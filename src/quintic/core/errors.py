"""The error tree: one root, one branch for what a user can mend.

``QuinticError`` is everything this package raises on purpose. ``UserError`` is a mistake that the
person at the keyboard can mend; it is a ``ValueError`` too, and its message says what was found, what
was expected and what to do next. The command line prints such a message without a traceback and exits
with code 2. Mistakes of our own are plain ``assert``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CodecError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "QuinticError",
    "SamplingError",
    "UserError",
    "suggest",
]


class QuinticError(Exception):
    """Root of every error that Quintic raises on purpose."""


class SamplingError(QuinticError):
    """A model's weights give no usable sample, as in the first steps of a training."""


class UserError(QuinticError, ValueError):
    """A mistake the user can mend: found this, expected that, do this next."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(UserError):
    """Input data is missing, empty, unreadable, undecodable or has changed."""


class CheckpointError(UserError):
    """A run folder or checkpoint is missing, damaged, foreign or already there."""


class CodecError(UserError):
    """A coded image is damaged or was made with another model."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; it comes with an extra: pip install 'quintic[{extra}]'")


def suggest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or the list of names if none is close.

    Args:
        name: What was found, a string or what somebody gave instead of one.
        known: What is accepted.
        cutoff: Similarity in [0, 1] from which a name counts as close.

    Example:
        >>> suggest("optim.lrr", ["optim.lr", "optim.name"])
        "; did you mean 'optim.lr'?"
        >>> suggest("zzz", ["laptop", "tiny"])
        '; expected one of: laptop, tiny'
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean '{close[0]}'?"
    return "; expected one of: " + ", ".join(names) if names else ""
