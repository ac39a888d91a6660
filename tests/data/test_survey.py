"""Surveys: noted for files that stay as they are, made again for any that changed."""

import hashlib
import os
import time

import pytest

from quintic.core import DataError
from quintic.core.files import cache_dir
from quintic.data import survey as room
from quintic.data.readers import read_documents
from quintic.data.survey import take_survey


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path / "cache"))


class Reader:
    """Counts how often the files are read."""

    def __init__(self, *files):
        self.files, self.times = files, 0

    def __call__(self):
        self.times += 1
        return read_documents(self.files)

    def survey(self, *how):
        return take_survey(self.files, self, how, lambda _: None)


@pytest.fixture
def later(monkeypatch):
    """A clock that shows an hour from now: files have settled."""
    now = time.time_ns
    monkeypatch.setattr(room.time, "time_ns", lambda: now() + 3_600_000_000_000)


def test_digest_is_of_lengths_and_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("né", encoding="utf-8")
    (tmp_path / "b.txt").write_text("x")
    found = Reader(tmp_path / "a.txt", tmp_path / "b.txt").survey()
    expected = b"".join(len(part).to_bytes(8, "little") + part for part in ("né".encode(), b"x"))
    assert found == (hashlib.sha256(expected).hexdigest(), 3)


def test_files_that_stay_are_read_once(tmp_path, later):
    path = tmp_path / "a.txt"
    path.write_text("some words")
    reader = Reader(path)
    first = reader.survey("utf-8")
    assert reader.survey("utf-8") == first and reader.times == 1
    reader.survey("latin-1")  # perhaps another text
    assert reader.times == 2
    path.write_text("more words")  # as many
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
    assert reader.survey("utf-8").digest != first.digest and reader.times == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows notes no time of a change of the times")
def test_a_time_that_was_put_back_deceives_nobody(tmp_path, later):
    path = tmp_path / "a.txt"
    path.write_text("some words")
    before = path.stat()
    reader = Reader(path)
    first = reader.survey()
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_text("more words")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reader.survey().digest != first.digest


def test_what_has_just_changed_is_not_noted(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    reader = Reader(tmp_path / "a.txt")
    reader.survey()
    assert not list(cache_dir("texts").iterdir()) and reader.survey() and reader.times == 2


def test_a_file_that_changes_meanwhile_is_not_noted(tmp_path, later):
    path = tmp_path / "a.txt"
    path.write_text("some words")

    def documents():
        path.write_text("some words and more")
        return read_documents([path])

    take_survey([path], documents, [], lambda _: None)
    assert not list(cache_dir("texts").iterdir())


@pytest.mark.parametrize("damage", ["", "[]", '{"digest": 1}', '{"digest": "a", "chars": "b"}'])
def test_a_damaged_note_is_made_again(tmp_path, later, damage):
    (tmp_path / "a.txt").write_text("some words")
    reader = Reader(tmp_path / "a.txt")
    first = reader.survey()
    (note,) = cache_dir("texts").iterdir()
    note.write_text(damage)
    assert reader.survey() == first and reader.times == 2
    assert reader.survey() == first and reader.times == 2


def test_long_texts_tell_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_TOLD_EVERY", 1_000_000)
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path in paths:
        path.write_text("ten chars " * 150_000)
    told = []
    take_survey(paths, lambda: read_documents(paths), [], told.append)
    assert told == ["read 2 million characters", "read 3 million characters", "read 4 million characters"]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt"):
        Reader(tmp_path / "gone.txt").survey()
