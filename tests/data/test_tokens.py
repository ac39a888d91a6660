"""Tokens: nothing lost, split by characters, cached by content, rebuilt when damaged."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintic.assets import corpus_path
from quintic.core import ConfigError, DataError
from quintic.core.files import cache_dir
from quintic.data import DataConfig, Split, Tokenizer, document_ids, num_windows, prepare, windows

BYTE = DataConfig(tokenizer="byte")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"note {i}: " + "wörds and words 你好. " * (5 + i), encoding="utf-8")
    return folder


def text_of(data, name):
    return data.tokenizer.decode(getattr(data, name).ids)


def test_embedded_corpus():
    """The figures of the documentation."""
    data = corpus_path().read_bytes()
    assert hashlib.sha256(data).hexdigest() == "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"
    found = prepare(None, DataConfig())
    assert found.folder.name == "eb43f775ad29860d8c445cab70f7646d"  # or runs of before would not resume
    text = data.decode("utf-8")
    cuts = [0, round(len(text) * 0.9), round(len(text) * 0.95), len(text)]
    for name, a, b in zip(("train", "validation", "test"), cuts[:-1], cuts[1:], strict=True):
        assert text_of(found, name) == text[a:b]
        split = getattr(found, name)
        assert (split.num_bytes, split.num_chars) == (len(text[a:b].encode()), b - a)
    assert found.tokenizer.vocab_size == 1024 and found.train.ids.dtype == np.uint16
    # The vocabulary has not seen the held-out text.
    assert Tokenizer.train([text[: cuts[1]]], 1024).encode(text[:5000]) == found.tokenizer.encode(text[:5000])


def test_splits_are_in_order_and_complete(notes):
    data = prepare([notes], DataConfig(tokenizer="byte", validation_fraction=0.2, test_fraction=0.1))
    whole = "".join(path.read_text(encoding="utf-8") for path in sorted(notes.iterdir()))
    parts = [text_of(data, name) for name in ("train", "validation", "test")]
    assert "".join(parts) == whole
    assert [len(part) for part in parts] == [data.train.num_chars, data.validation.num_chars, data.test.num_chars]
    assert abs(len(parts[1]) - 0.2 * len(whole)) <= 1
    separators = sum(
        int((getattr(data, n).ids == data.tokenizer.separator_id).sum()) for n in ("train", "validation", "test")
    )
    assert separators == 7 + 2  # two documents are cut


@given(st.integers(0, 70), st.integers(1, 16))
def test_windows_predict_every_token_once(length, context):
    split = Split(np.arange(100, 100 + length, dtype=np.uint16), 0, 0, 0)
    count = num_windows(split, context)
    inputs, targets = windows(split, np.arange(count), context)
    assert inputs.shape == targets.shape == (count, context)
    flat_inputs, flat_targets = inputs.ravel(), targets.ravel()
    predicted = flat_targets >= 0
    assert flat_targets[predicted].tolist() == list(range(101, 100 + length))
    assert (flat_inputs[predicted] + 1 == flat_targets[predicted]).all()
    assert ((flat_inputs == 0) | (flat_inputs >= 100)).all()


def test_window_order_is_free():
    split = Split(np.arange(50, dtype=np.uint16), 0, 0, 0)
    inputs, targets = windows(split, np.array([3, 0, 3]), 8)
    assert inputs[0].tolist() == inputs[2].tolist() == list(range(24, 32))
    assert targets[1].tolist() == list(range(1, 9))


def test_document_ids():
    assert document_ids(np.array([[9, 9, 0, 9], [0, 9, 0, 0]]), 0).tolist() == [[0, 0, 1, 1], [1, 1, 2, 3]]


def test_cache_is_reused_only_for_the_same_content_and_settings(notes):
    first = prepare([notes], BYTE)
    assert not first.reused and prepare([notes], BYTE).reused
    assert prepare([notes], DataConfig(tokenizer="byte", cross_documents=False)).reused
    changed = prepare([notes], DataConfig(tokenizer="byte", test_fraction=0.2))
    assert not changed.reused and changed.fingerprint != first.fingerprint
    (notes / "3.txt").rename(notes / "9.txt")
    moved = prepare([notes], BYTE)
    assert not moved.reused and moved.fingerprint != first.fingerprint
    (notes / "9.txt").write_text("other words")
    assert not prepare([notes], BYTE).reused
    assert not any(path.suffix == ".bin" for path in notes.rglob("*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest"])
def test_a_damaged_cache_is_made_again_and_said(notes, damage):
    first = prepare([notes], BYTE)
    expected, target = text_of(first, "train"), first.folder / "train.bin"
    if damage == "flip":
        target.write_bytes(bytes([target.read_bytes()[0] ^ 1]) + target.read_bytes()[1:])
    elif damage == "truncate":
        target.write_bytes(target.read_bytes()[:-2])
    elif damage == "missing":
        target.unlink()
    else:
        (first.folder / "manifest.json").write_text("{}")
    again = prepare([notes], BYTE)
    assert not again.reused and "damaged" in again.warnings[0]
    assert text_of(again, "train") == expected


def test_several_processes_at_once(notes):
    program = "import sys; from quintic.data import *; print(prepare([sys.argv[1]], DataConfig('byte')).fingerprint)"
    program = program.replace("sys.argv[1]]", "__import__('pathlib').Path(sys.argv[1])]")
    command = [sys.executable, "-c", program, str(notes)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate(timeout=60)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert set(answers) == {prepare([notes], BYTE).fingerprint + "\n"}
    leftovers = [path.name for path in cache_dir("tokens").iterdir() if "-" in path.name]
    assert leftovers == []


def test_automatic_choices(notes, tmp_path):
    small = prepare([notes], DataConfig())
    assert small.tokenizer.vocab_size == 257 and "bytes" in small.notes["tokenizer"]
    (tmp_path / "big.txt").write_text("many different words, so many words! " * 4000)
    big = prepare([tmp_path / "big.txt"], DataConfig())
    assert 257 < big.tokenizer.vocab_size <= 512 and "1000" in big.notes["tokenizer"]
    given_size = prepare([notes], DataConfig(vocab_size=300))
    assert given_size.tokenizer.vocab_size <= 300


def test_a_given_tokenizer_and_its_warning(notes, tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer.train(["words and notes " * 50], 280).save(path)
    data = prepare([notes], DataConfig(tokenizer=str(path)))
    assert data.tokenizer.hash == Tokenizer.load(path).hash and data.warnings == []
    backend = json.loads(path.read_text())
    backend["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(backend))
    (notes / "0.txt").write_text("UPPER " * 10)
    (warning,) = prepare([notes], DataConfig(tokenizer=str(path))).warnings
    assert "does not give this text back" in warning


def test_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="every document is empty"):
        prepare([tmp_path / "empty.txt"], BYTE)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="5 characters, at least 200"):
        prepare([tmp_path / "short.txt"], BYTE)
    for wrong in (
        {"vocab_size": 5},
        {"test_fraction": 1.5},
        {"validation_fraction": 0.6, "test_fraction": 0.6},
        {"special_tokens": "yes"},
        {"field": "{prompt}\\n{response}"},  # as a shell hands it over
    ):
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
            DataConfig(**wrong)


def test_a_separator_is_for_tokenizers_of_others(notes):
    with pytest.raises(ConfigError, match=r"data\.separator = 'x' is for a tokenizer\.json"):
        prepare([notes], DataConfig(tokenizer="byte", separator="x"))


def test_text_that_spells_the_separator_divides_documents_on_request(tmp_path):
    (tmp_path / "two.txt").write_text("<|endoftext|>one of the texts" * 2 * 10)
    given = {"tokenizer": "byte", "validation_fraction": 0.0, "test_fraction": 0.0}
    plain, marked = (prepare([tmp_path], DataConfig(special_tokens=how, **given)) for how in ("text", "token"))
    counts = [int((data.train.ids == 0).sum()) for data in (plain, marked)]
    assert counts == [1, 20] and plain.fingerprint != marked.fingerprint
    assert prepare([tmp_path], DataConfig(special_tokens="token", **given)).tokenizer.special_tokens == "token"


def test_a_wholly_held_out_text_may_be_short(tmp_path):
    (tmp_path / "line.txt").write_text("a line")
    data = prepare([tmp_path / "line.txt"], DataConfig(tokenizer="byte", validation_fraction=0.0, test_fraction=1.0))
    assert text_of(data, "test") == "a line" and data.train.num_tokens == data.validation.num_tokens == 0
