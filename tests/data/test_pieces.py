"""Pieces of a text: the same however it comes in parts, nothing lost, each in one document and one split."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintic.data import pieces
from quintic.data.pieces import Piece, divide, even, take

PARTS = st.lists(st.text("ab \n你", min_size=1, max_size=30), min_size=1, max_size=4)


@pytest.mark.parametrize("mark", ["\n", " ", "x"])
def test_long_texts_are_cut_without_loss(monkeypatch, mark):
    monkeypatch.setattr(pieces, "PIECE", 10)
    text = f"abcdefg{mark}" * 13 + "tail"
    found = [piece.text for piece in even([Piece(0, True, text)])]
    assert "".join(found) == text and all(0 < len(piece) <= 10 for piece in found)
    if mark == "\n":
        assert all(piece.endswith("\n") for piece in found[:-1])


@given(st.lists(PARTS, max_size=5), st.tuples(st.integers(0, 50), st.integers(0, 50)), st.integers(1, 12))
def test_pieces_do_not_depend_on_how_the_text_comes(documents, held_out, size):
    whole = ["".join(parts) for parts in documents]
    total = len("".join(whole))
    cuts = sorted(min(total, cut) for cut in held_out) + [total]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", size)
        found = list(even(divide(documents, cuts)))
        assert found == list(even(divide([[text] for text in whole], cuts)))
    assert "".join(piece.text for piece in found) == "".join(whole)
    assert all(0 < len(piece.text) <= size for piece in found)
    ends = list(itertools.accumulate(map(len, whole)))
    begins, place = [], 0
    for split, new, text in found:
        assert cuts[split - 1] * (split > 0) <= place < place + len(text) <= cuts[split]
        begins += [place] * new
        place += len(text)
    assert begins == sorted({0, *ends[:-1], *cuts[:-1]} - {total}) if total else found == []


def test_taken_until_there_is_enough():
    stream = iter([Piece(0, True, "abc"), Piece(0, True, "de"), Piece(1, True, "f")])
    assert ["".join(piece.text for piece in take(stream, 4)) for _ in range(3)] == ["abcde", "f", ""]
