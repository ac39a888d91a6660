"""Readers: what is found, what is read, and what a mistake says."""

import gzip
import json

import pytest

from quintic.core import DataError
from quintic.data.readers import find_sources, read_documents

TEXT = "héllo wörld, 你好 🐳\n"


def read(path, **kwargs):
    return list(read_documents(find_sources([path]).files, **kwargs))


def test_folders_are_searched_in_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/d.jsonl", "z.markdown.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = (json.dumps({"text": name}) if ".jsonl" in name else name).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for name in (".hidden.txt", ".git/x.txt", "picture.png", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not this")
    source = find_sources([tmp_path])
    assert list(read_documents(source.files)) == ["a.md", "b.txt", "z.markdown.gz", "sub/c.TXT", "sub/d.jsonl"]
    assert source.skipped == 2
    assert read(tmp_path / "code.py") == ["not this"]


def test_a_file_reached_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    assert len(find_sources([tmp_path / "a.txt", tmp_path, tmp_path]).files) == 1


@pytest.mark.parametrize(
    ("codec", "given"),
    [("utf-8", "auto"), ("utf-8-sig", "auto"), ("utf-16", "auto"), ("utf-32", "auto"), ("utf-16-le", "utf-16-le"),
     ("gb18030", "gb18030")],
)  # fmt: skip
def test_encodings(tmp_path, codec, given):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(codec))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode(codec)))
    assert read(tmp_path, encoding=given) == [TEXT, TEXT]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one\\ntwo", "id": 1}\n\n{"body": ""}\n{"body": "\\u2028"}\n{"body": "three"}\n')
    assert read(path, field="body") == ["one\ntwo", "three"]


MISTAKES = {
    "nothing.txt": (None, "no such file or folder"),
    "binary.txt": (b"GIF89a\0\0", "looks binary"),
    "latin.txt": ("für".encode("latin-1"), r"not utf-8 text: byte 0xfc at offset 1.*data\.encoding=gb18030|cp1252"),
    "chinese.txt": ("你好世界".encode("gb18030"), r"data\.encoding=gb18030"),
    "torn.txt.gz": (gzip.compress(b"hello" * 100)[:-9], "damaged gzip"),
    "liar.txt.gz": (b"plain", "is not a gzip file"),
    "a.jsonl": (b'{"text": "x"}\n{"text"', r"a\.jsonl:2: not JSON"),
    "b.jsonl": (
        b'{"body": "x"}',
        r"b\.jsonl:1: no field 'text'; the fields are 'body'; choose one with data\.field=body",
    ),
    "c.jsonl": (b"[1]", "expected a JSON object"),
    "d.jsonl": (b'{"text": 3}', "is not text but int"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_what_and_where(tmp_path, name):
    data, message = MISTAKES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_empty_folder_and_unknown_codec(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no text; looked for \.txt.*found 1 other files"):
        find_sources([tmp_path])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="unknown encoding 'klingon'"):
        read(tmp_path, encoding="klingon")


def test_no_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("quintic.data.readers.Path.read_bytes", refuse)  # chmod does not stop an administrator
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        read(tmp_path)
