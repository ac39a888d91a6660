"""Tokenizers: exact round trips, the separator, streams, foreign files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from quintic.core import DataError
from quintic.data.tokenizer import SEPARATOR, StreamDecoder, Tokenizer, _cut_long_words, vocab_size_for

SAMPLE = "The whale, the whale! Call me Ishmael.\n" * 50 + "床前明月光，疑是地上霜。\n" * 20
BPE = Tokenizer.train([SAMPLE], 400)
BYTES = Tokenizer.bytes()


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=st.text(max_size=40))
def test_a_stream_shows_whole_characters(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_text_that_spells_the_separator_stays_text():
    text = f"a{SEPARATOR}b"
    for tokenizer in (BPE, BYTES):
        assert tokenizer.separator_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_repeatable_and_learns_chinese():
    again = Tokenizer.train([SAMPLE], 400)
    assert again.hash == BPE.hash and BPE.vocab_size <= 400
    line = "床前明月光"
    assert len(BPE.encode(line)) < len(BYTES.encode(line)) / 3


def test_a_text_without_spaces_trains_and_comes_back():
    """As one word it would take hours."""
    bases = np.array(list("acgt"))
    text = "".join(bases[np.random.default_rng(0).integers(0, 4, 1_000_000)])
    tokenizer = Tokenizer.train([f"some words before {text} and after"], 400)
    ids = tokenizer.encode(text[:5000])
    assert len(ids) < 2500 and tokenizer.decode(ids) == text[:5000]


def test_only_long_words_are_cut_for_training():
    texts = [f"some words {'x' * 2500} more  words\n", "b" * 1000, "", "c " * 2000]
    parts = list(_cut_long_words(texts[0]))
    assert "".join(parts) == texts[0] and len(parts) == 3 and max(len(w) for p in parts for w in p.split()) <= 1000
    assert [list(_cut_long_words(text)) for text in texts[1:]] == [[text] for text in texts[1:]]


def test_saved_tokenizers_load_here_and_in_the_library(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == BPE.hash
    assert HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("whale").ids == BPE.encode("whale")


def test_a_foreign_tokenizer_loses_its_truncation_and_padding(tmp_path):
    backend = HFTokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 5}, merges=[]))
    backend.enable_truncation(2)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.encode("aba") == [1, 5, 1]
    assert (tokenizer.separator, tokenizer.separator_id, tokenizer.vocab_size) == ("</s>", 0, 6)


def test_unusable_files(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "x.json")
    (tmp_path / "y.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "y.json")
    HFTokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "z.json"))
    with pytest.raises(DataError, match=r"z\.json has no token to separate documents"):
        Tokenizer.load(tmp_path / "z.json")


def test_vocabulary_follows_the_text():
    assert [vocab_size_for(n) for n in (0, 1_023_999, 1_024_000, 5_000_000, 10**12)] == [512, 512, 1024, 4096, 32768]


def test_a_tokenizer_tells_its_size():
    assert repr(BYTES) == "Tokenizer(257 ids, separator '<|endoftext|>')"
