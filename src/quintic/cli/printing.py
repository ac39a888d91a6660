"""Lines for a person: no markup, no colouring of numbers, no wrapping that would break a copied path."""

from __future__ import annotations

from rich.console import Console

__all__ = ["say", "visible"]

_SEEN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_SEEN |= dict.fromkeys(range(128, 160), 0xFFFD)


def say(text: str, *, console: Console | None = None, style: str | None = None) -> None:
    """Print a line as it is."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def visible(text: str) -> str:
    """Text whose control characters are seen rather than obeyed by a terminal; line ends and tabs stay.

    Example:
        >>> visible("\\x1b[31mred\\n")
        '␛[31mred\\n'
    """
    return text.translate(_SEEN)
