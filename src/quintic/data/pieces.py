"""A text of any length as a stream of pieces, each within one document and one split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["PIECE", "Piece", "divide", "even", "take"]

PIECE = 1 << 20
"""Characters of a piece at most."""


class Piece(NamedTuple):
    """Some consecutive characters."""

    split: int
    """Number of the split."""
    begins: bool
    """Whether a document begins here, or goes on behind the end of a split."""
    text: str
    """At least one character."""


def divide(documents: Iterable[Iterable[str]], cuts: Sequence[int]) -> Iterator[Piece]:
    """The text by splits; a document that is cut begins again behind the cut.

    Args:
        documents: Each an iterable of its parts.
        cuts: Character positions where the splits end.
    """
    position, split = 0, 0
    for document in documents:
        new = True
        for text in document:
            start = 0
            while start < len(text):
                while position >= cuts[split]:
                    split, new = split + 1, True
                end = min(len(text), start + cuts[split] - position)
                yield Piece(split, new, text[start:end])
                position += end - start
                start, new = end, False


def even(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same in pieces of about a megabyte, cut behind line ends where there are any; short documents stay."""
    held, split, new = "", 0, True
    for next_split, begins, text in pieces:
        if begins:
            if held:
                yield Piece(split, new, held)
            held, split, new = "", next_split, True
        held += text
        start = 0
        while len(held) - start > PIECE:
            end = _line_end(held, start)
            yield Piece(split, new, held[start:end])
            start, new = end, False
        held = held[start:]
    if held:
        yield Piece(split, new, held)


def _line_end(text: str, start: int) -> int:
    """Where to cut a text that goes on for more than a piece."""
    end = start + PIECE
    for mark in ("\n", " "):
        if (cut := text.rfind(mark, start, end)) >= start:
            # A space belongs to the word behind it.
            return cut + 1 if mark == "\n" else max(cut, start + 1)
    return end


def take(pieces: Iterator[Piece], characters: int) -> list[Piece]:
    """The next pieces, until they have that many characters; none at the end."""
    taken: list[Piece] = []
    total = 0
    for piece in pieces:
        taken.append(piece)
        total += len(piece.text)
        if total >= characters:
            break
    return taken
