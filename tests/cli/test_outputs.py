"""Commands replace no file unasked, whether its name was given or is their own."""

import pytest
from tests.cli.command import quintic

TABLE = "a,b\n1,2\n3,5\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kept", ["z.png", "z.npy"])
def test_neither_a_picture_nor_the_array_beside_it_is_replaced(here, capsys, kept):
    (here / kept).write_bytes(b"precious")
    command = ["generate", "ddpm/fashion28", "--n", "1", "--steps", "2", "--out", "z.png"]
    assert quintic(*command) == 2
    assert f"{kept} exists; --overwrite replaces it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {kept: b"precious"}
    assert quintic(*command, "--overwrite") == 0
    assert sorted(path.name for path in here.iterdir()) == ["z.npy", "z.png"]
    assert (here / kept).read_bytes() != b"precious"


def test_a_name_that_nobody_chose_gets_a_number(here, capsys):
    (here / "ddpm-fashion28-seed0.npy").write_bytes(b"precious")
    for name in ("ddpm-fashion28-seed0-2", "ddpm-fashion28-seed0-3"):
        assert quintic("generate", "ddpm/fashion28", "--n", "1", "--steps", "2") == 0
        assert f"{name}.png and {name}.npy" in capsys.readouterr().out
    assert (here / "ddpm-fashion28-seed0.npy").read_bytes() == b"precious"
    assert quintic("generate", "ddpm/fashion28", "--n", "1", "--steps", "2", "--overwrite") == 0
    assert (here / "ddpm-fashion28-seed0.npy").read_bytes() != b"precious"


@pytest.mark.parametrize("verb", ["cur", "id"])
def test_the_picture_of_a_table(here, capsys, verb):
    (here / "t.csv").write_text(TABLE)
    (here / "keep.svg").write_text("precious")
    command = ["matrix", verb, "t.csv", "--rank", "1"]
    assert quintic(*command, "--out", "keep.svg") == 2
    assert "keep.svg exists; --overwrite replaces it" in capsys.readouterr().err
    assert (here / "keep.svg").read_text() == "precious"
    assert quintic(*command, "--out", "keep.svg", "--overwrite") == 0
    assert "<svg" in (here / "keep.svg").read_text()
    for name in (f"t-{verb}.svg", f"t-{verb}-2.svg"):
        assert quintic(*command) == 0
        assert f"picture: {name}" in capsys.readouterr().out


def test_a_table_whose_name_is_no_text(here):
    try:
        (here / "t\udcff.csv").write_text(TABLE)
    except (OSError, UnicodeError):
        pytest.skip("names of files are text here")
    assert quintic("matrix", "cur", "t\udcff.csv", "--rank", "1") == 0
    assert "t?.csv" in (here / "t\udcff-cur.svg").read_text(encoding="utf-8")
