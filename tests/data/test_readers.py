"""Readers: what is found, what is read, and what a mistake says."""

import gzip
import json
import sys
import tracemalloc

import pytest

from quintic.core import DataError
from quintic.data.readers import find_sources, read_documents

TEXT = "héllo wörld, 你好 🐳\n"


def read(path, **kwargs):
    return texts(find_sources([path]).files, **kwargs)


def texts(files, **kwargs):
    return ["".join(parts) for parts in read_documents(files, **kwargs)]


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
    assert texts(source.files) == ["a.md", "b.txt", "z.markdown.gz", "sub/c.TXT", "sub/d.jsonl"]
    assert source.skipped == 2
    assert read(tmp_path / "code.py") == ["not this"]


def test_links_are_followed_and_those_that_lead_nowhere_are_counted(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("b")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("a")
    (notes / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(notes)  # a loop
    (notes / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    source = find_sources([notes])
    assert texts(source.files) == ["a", "b"] and source.skipped == 1


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


def test_several_fields_of_a_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"ask": "What? {answer}", "answer": "This."}\n{"ask": "", "answer": "That.", "id": 3}\n')
    assert read(path, field="Q: {ask}\nA: {answer}") == ["Q: What? {answer}\nA: This.", "Q: \nA: That."]
    assert read(path, field="{answer}{answer}!") == ["This.This.!", "That.That.!"]
    for field, message in (
        ("{ask}{reply}", "no field 'reply'"),
        ("{id} {ask}", "no field 'id'"),
        ("{}", "no field '{}'"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl:1: {message}"):
            read(path, field=field)


def test_conversations_become_paragraphs(tmp_path):
    path = tmp_path / "chat.jsonl"
    ours = [{"role": "user", "content": "Hi {x}"}, {"role": "assistant", "content": "Hello\nyou"}]
    theirs = [{"from": "human", "value": "Hi"}]
    path.write_text("".join(json.dumps({"messages": each, "id": "7"}) + "\n" for each in (ours, theirs)))
    assert read(path, field="messages") == ["user: Hi {x}\n\nassistant: Hello\nyou", "human: Hi"]
    assert read(path, field="#{id}\n{messages}")[1] == "#7\nhuman: Hi"
    path.write_text(json.dumps({"messages": theirs}))
    with pytest.raises(DataError, match=r"no field 'text'.*choose one with data\.field=messages"):
        read(path)
    for wrong in (
        [],
        ["Hi"],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"content": "x"}],
    ):
        path.write_text(json.dumps({"messages": wrong}))
        with pytest.raises(DataError, match=r"chat\.jsonl:1: field 'messages' is not text but list; expected a string"):
            read(path, field="messages")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_arrays_of_json(tmp_path, indent, codec):
    path = tmp_path / "a.json"
    path.write_text("\n \n" + json.dumps([{"body": "one"}, {"body": " "}, "two"], indent=indent), encoding=codec)
    assert read(path, field="body") == ["one", "two"]
    assert find_sources([tmp_path / "a.json"]).files == [path]
    with pytest.raises(DataError, match=r"a\.json\[0\]: no field 'text'; the fields are 'body'"):
        read(path)
    path.write_text('{"body": "one"}\n{"body": "two"}\n')  # lines, under the other name
    assert read(path, field="body") == ["one", "two"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_are_read_one_by_one(tmp_path, suffix):
    """Lines far larger together than what is held at a time: a corpus need not fit in the memory."""
    path = tmp_path / f"a.jsonl{suffix}"
    line = json.dumps({"text": "word " * 20_000}).encode() + b"\r\n"
    with gzip.open(path, "wb", 1) if suffix else path.open("wb") as file:
        for _ in range(200):
            file.write(line)
    assert _most_memory(path, 200 * 100_000) < 20 * len(line)  # the file is 200 of them


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_a_text_is_read_in_parts(tmp_path, suffix, codec):
    path = tmp_path / f"a.txt{suffix}"
    part = "wörd " * 200_000
    with gzip.open(path, "wt", 1, codec) if suffix else path.open("w", encoding=codec) as file:
        for _ in range(20):
            file.write(part)
    assert _most_memory(path, 20 * len(part)) < 10 * len(part)  # the file is 20 of them, each of more bytes


def _most_memory(path, characters):
    """Bytes at most while a file of so many characters is read."""
    list(read_documents([path]))  # what is imported on the way counts once
    tracemalloc.start()
    try:
        assert sum(len(text) for parts in read_documents([path]) for text in parts) == characters
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_document_can_be_gone_through_again(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXT}))
    for parts in read_documents(find_sources([tmp_path]).files):
        assert "".join(parts) == "".join(parts) == TEXT


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_wide_encodings_without_a_mark_are_read_when_named(tmp_path, codec, suffix):
    path = tmp_path / f"a.{suffix}"
    written = TEXT if suffix == "txt" else json.dumps({"text": TEXT})
    path.write_bytes(written.encode(f"{codec}-{sys.byteorder[0]}e"))
    assert read(path, encoding=codec) == [TEXT]
    path.write_bytes(written.encode(codec))  # and with one
    assert read(path, encoding=codec) == read(path) == [TEXT]


def test_json_lines_in_other_encodings(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps({"text": f"{TEXT}\u2028{i}"}, ensure_ascii=False) + "\r\n" for i in range(3))
    for codec, given in (("utf-8-sig", "auto"), ("utf-16", "auto"), ("gb18030", "gb18030")):
        path.write_bytes(lines.encode(codec))
        assert read(path, encoding=given) == [f"{TEXT}\u2028{i}" for i in range(3)]


MISTAKES = {
    "nothing.txt": (None, "no such file or folder"),
    "binary.txt": (b"GIF89a\0\0", r"looks binary.*what it is$"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0", r"looks binary.*for pictures take --task tarflow or --task ddpm$"),
    "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", r"paper\.pdf is a PDF; give its text"),
    "latin.txt": ("für".encode("latin-1"), r"not utf-8 text: byte 0xfc at offset 1.*data\.encoding=gb18030|cp1252"),
    "chinese.txt": ("你好世界".encode("gb18030"), r"data\.encoding=gb18030"),
    "late.txt": (b"x" * 3_000_000 + b"\xe4\xbd!", r"byte 0xe4 at offset 3000000.*data\.encoding="),
    "late.txt.gz": (gzip.compress("é".encode() * 600_000 + b"\xff"), r"byte 0xff at offset 1200000"),
    "cut.txt": (b"x" * 3_000_000 + "你".encode()[:2], r"byte 0xe4 at offset 3000000"),
    "marked.txt": (b"\xef\xbb\xbfab\xff", r"byte 0xff at offset 5"),
    "torn.txt.gz": (gzip.compress(b"hello" * 100)[:-9], "damaged gzip"),
    "liar.txt.gz": (b"plain", "is not a gzip file"),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000, r"deep\.jsonl:1: not JSON \(brackets within brackets\)"),
    "digits.jsonl": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", r"digits\.jsonl:1: not JSON \(a number of thousands"),
    "deep.json": (b"[" * 200_000, r"deep\.json: not JSON \(brackets within brackets\)"),
    "a.jsonl": (b'{"text": "x"}\n{"text"', r"a\.jsonl:2: not JSON"),
    "b.jsonl": (
        b'{"body": "x"}',
        r"b\.jsonl:1: no field 'text'; the fields are 'body'; choose one with data\.field=body",
    ),
    "c.jsonl": (b"[1]", "expected a JSON object"),
    "d.jsonl": (b'{"text": 3}', "is not text but int"),
    "e.jsonl": (
        b'{"text": "\\ud83d\\udc33 whole"}\n{"text": "a\\ud83d"}',
        r"e\.jsonl:2: field 'text' has half of a surrogate pair \(\\ud83d at character 1\)",
    ),
    "f.jsonl": (
        b'{"text": "x"}\n' * 1000 + b'{"text": "\xff"}',
        r"f\.jsonl is not utf-8 text: byte 0xff at offset 14010",
    ),
    "g.jsonl": (b'{"text": "\0"}', "looks binary"),
    "h.json": (b'[{"text": "x"}, {"text": 3}]', r"h\.json\[1\]: field 'text' is not text but int"),
    "i.json": (b'[{"text": "x"},\n {"text"]', r"i\.json: not JSON \(.* in line 2\)"),
    "j.json": (b'{\n "text": "x"\n}', r"neither an array of JSON objects nor one object a line.*name it \.txt"),
    "k.json": (b"[[1]]", r"k\.json\[0\]: expected a JSON object with a field 'text', found '\[1\]'"),
    "l.parquet": (b"PAR1\x15\0", r"is a Parquet file; give its rows as JSON lines"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 1000)[:-9], "damaged gzip"),
    "liar.jsonl.gz": (b'{"text": "x"}', "is not a gzip file"),
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
    with pytest.raises(
        DataError, match=r"holds no text; looked for \.txt.*found 1 other files.*; for pictures take --task tarflow"
    ):
        find_sources([tmp_path])
    (tmp_path / "a.txt").write_text("x")
    for name in ("klingon", "hex"):  # the second is a codec, but none of text
        with pytest.raises(DataError, match=f"unknown encoding '{name}'"):
            read(tmp_path, encoding=name)


def test_no_permission(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("quintic.data.readers.Path.open", refuse)  # chmod does not stop an administrator
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        read(tmp_path)
