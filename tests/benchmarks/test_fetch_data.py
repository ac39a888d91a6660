"""Fetching with a stand-in for the client: only the expected archive is used, and failures leave nothing behind."""

import sys
from dataclasses import replace

import pytest
from benchmarks import fetch_data

from quintic.core.files import sha256_bytes

CONTENT = b"archive"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    def arrange(archive, target):
        (target / "picture.txt").write_bytes(archive.read_bytes())

    made = fetch_data.Recipe(
        (sys.executable, "-c", f"open('a.tgz', 'wb').write({CONTENT!r})"), sha256_bytes(CONTENT), arrange, "CC0-1.0"
    )
    monkeypatch.setattr(fetch_data, "HOME", tmp_path / "datasets")
    monkeypatch.setattr(fetch_data, "RECIPES", {"set": made})
    return made


def change(monkeypatch, recipe, **changes):
    monkeypatch.setattr(fetch_data, "RECIPES", {"set": replace(recipe, **changes)})


def test_an_archive_is_laid_out_once(recipe, capsys, monkeypatch):
    assert fetch_data.find("set") is None
    assert fetch_data.main([]) == 0
    folder = fetch_data.find("set")
    assert (folder / "picture.txt").read_bytes() == CONTENT
    assert (folder / "licence.txt").read_text() == "CC0-1.0\n"
    change(monkeypatch, recipe, command=("no such client",))
    assert fetch_data.main(["set"]) == 0
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "expected 0000"),
        ({"command": ("no-such-client-anywhere",)}, "is not installed"),
        ({"command": (sys.executable, "-c", "raise SystemExit('no network')")}, "no network"),
        ({"command": (sys.executable, "-c", "")}, "failed"),
    ],
)
def test_failures_are_named_and_leave_nothing(recipe, capsys, monkeypatch, changes, words):
    change(monkeypatch, recipe, **changes)
    assert fetch_data.main([]) == 1
    assert words in capsys.readouterr().err
    assert fetch_data.find("set") is None


def test_an_arrangement_that_breaks_off_leaves_nothing(recipe, monkeypatch):
    def broken(archive, target):
        (target / "half").touch()
        raise OSError("disk full")

    change(monkeypatch, recipe, arrange=broken)
    assert fetch_data.main([]) == 1
    assert fetch_data.find("set") is None


def test_unknown_names_are_refused(recipe, capsys):
    assert fetch_data.main(["sett"]) == 2
    assert "expected one of: set" in capsys.readouterr().err


def test_every_recipe_pins_a_version_and_a_checksum():
    for recipe in fetch_data.RECIPES.values():
        assert any("=" in word or "@" in word for word in recipe.command)
        assert len(recipe.sha256) == 64
