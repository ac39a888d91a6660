"""Lines for a person: no markup, no colouring of numbers, no wrapping that would break a copied path."""

from __future__ import annotations

from rich.console import Console

__all__ = ["say"]


def say(text: str, *, console: Console | None = None, style: str | None = None) -> None:
    """Print a line as it is."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True, style=style)
