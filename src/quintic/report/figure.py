"""A figure: a title, something drawn, and one sentence that says what to look at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Figure"]


@dataclass(frozen=True)
class Figure:
    """One figure of the page."""

    title: str
    """Plain text."""
    body: str
    """HTML."""
    caption: str
    """Plain text."""
    wide: bool = False
    """Whether it takes the whole width of the page."""
