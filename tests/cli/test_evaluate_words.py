"""An evaluation says how much it is of, which weights it is of, and as what files were read."""

import json

import pytest
from tests.cli.command import quintic

TEXT = "".join(f"The whale {i} swam under the ship and the captain looked at the sea.\n" for i in range(40))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "page.html").write_text(TEXT, encoding="utf-8")
    assert quintic("train", folder / "page.html", "--size", "tiny", "engine.steps=2", "--out", folder / "run") == 0
    return folder / "run"


def test_training_says_it_at_both_ends(run, tmp_path, capsys):
    book = run.parent / "page.html"
    assert quintic("train", book, "--size", "tiny", "engine.steps=1", "--out", tmp_path / "again") == 0
    told = " ".join(capsys.readouterr().out.split())
    size = json.loads((run / "run.json").read_text())["data"]["validation"]
    assert f"read as plain text, whatever the ending: {book}" in told
    assert f"the validation split is {size['bytes']} bytes, {size['tokens']} tokens, too few" in told
    assert f"bits per byte ({size['bytes']} bytes)" in told


def test_a_split_of_the_run(run, capsys):
    size = json.loads((run / "run.json").read_text())["data"]["test"]
    assert quintic("evaluate", run) == 0
    told = capsys.readouterr().out
    assert "weights of step 2\n" in told and f"({size['bytes']} bytes, {size['tokens']} tokens)" in told
    assert "warning: so little text" in told and "read as" not in told
    assert quintic("evaluate", run, "--split", "validation", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    other = json.loads((run / "run.json").read_text())["data"]["validation"]
    assert (found["step"], found["bytes"], found["tokens"]) == (2, other["bytes"], other["tokens"])


def test_other_text(run, tmp_path, capsys):
    for name in ("b.txt", "d.csv", "e"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    assert quintic("evaluate", run, tmp_path / "b.txt") == 0
    told = capsys.readouterr().out
    assert f"({len(TEXT):,} bytes, " in told and "warning" not in told and "read as" not in told
    assert quintic("evaluate", run, tmp_path / "b.txt", tmp_path / "d.csv", tmp_path / "e") == 0
    assert (
        f"read as plain text, whatever the ending: {tmp_path / 'd.csv'}, {tmp_path / 'e'}\n" in capsys.readouterr().out
    )
