"""Atomic files: whole or absent, whatever goes wrong on the way."""

import os

import pytest

from quintic.core import ConfigError, files


def test_atomic_write_replaces_whole(tmp_path):
    target = tmp_path / "a.txt"
    files.atomic_write(target, "old")
    files.atomic_write(target, b"new\n")
    assert target.read_bytes() == b"new\n"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions, and links for administrators only")
def test_a_file_that_is_replaced_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    private = tmp_path / "elsewhere" / "private.txt"
    private.parent.mkdir()
    private.write_text("old")
    private.chmod(0o600)
    link = tmp_path / "link.txt"
    link.symlink_to(private)
    files.atomic_write(link, "new")
    assert link.is_symlink() and private.read_text() == "new" and private.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["elsewhere", "link.txt", "private.txt"]
    (tmp_path / "dangling").symlink_to("later.txt")
    files.atomic_write(tmp_path / "dangling", "here")
    assert (tmp_path / "later.txt").read_text() == "here" and (tmp_path / "dangling").is_symlink()


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    files.atomic_write(target, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space") as failed:
        files.atomic_write(target, "new")
    assert failed.value.filename == str(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_cache_that_cannot_be_made_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="set QUINTIC_CACHE to one that can"):
        files.cache_dir("tokens")


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as failed:
        files.atomic_write(tmp_path / "nowhere" / "a.txt", "x")
    assert failed.value.filename == str(tmp_path / "nowhere" / "a.txt")


def test_atomic_write_respects_umask(tmp_path):
    if os.name == "nt":
        pytest.skip("no umask on Windows")
    old = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "a", "x")
        with files.atomic_folder(tmp_path / "f") as folder:
            os.close(os.open(folder / "b", os.O_CREAT, mode=0o600))  # as safetensors does
    finally:
        os.umask(old)
    for name in ("a", "f/b"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "f"]


def test_the_umask_of_other_threads_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("a file of another thread would be open to everybody"))
    files.atomic_write(tmp_path / "a", "x")
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "b").touch()


def test_atomic_folder_appears_whole(tmp_path):
    with files.atomic_folder(tmp_path / "f") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "sub" / "x").read_text() == "1"
    with pytest.raises(FileExistsError), files.atomic_folder(tmp_path / "f"):
        pass


def test_atomic_folder_that_fails_leaves_nothing_of_its_own_and_all_that_is_not(tmp_path):
    (tmp_path / "f.tmp").mkdir()
    (tmp_path / "f.tmp" / "thesis.txt").write_text("somebody's own")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "f") as folder:
        assert list(folder.iterdir()) == [] and folder.name.endswith(".tmp")
        1 / 0  # noqa: B018
    with files.atomic_folder(tmp_path / "g.tmp"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["f.tmp", "g.tmp", "thesis.txt"]


def test_atomic_folder_replaces_no_link(tmp_path):
    (tmp_path / "f").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError), files.atomic_folder(tmp_path / "f"):
        pass


def test_cache_dir_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path / "cache"))
    assert files.cache_dir("tokens", "k") == tmp_path / "cache" / "tokens" / "k"
    monkeypatch.delenv("QUINTIC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if os.name != "nt":
        assert files.cache_dir() == tmp_path / "xdg" / "quintic"


def test_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert files.sha256_file(tmp_path / "x") == files.sha256_bytes(b"abc") == known


@pytest.mark.skipif(os.name == "nt", reason="paths are shorter there")
@pytest.mark.parametrize("name", ["n" * 255, "\N{WHALE}" * 63])
def test_names_as_long_as_the_system_allows(tmp_path, name):
    files.atomic_write(tmp_path / name, b"a")
    assert (tmp_path / name).read_bytes() == b"a"
    (tmp_path / name).unlink()
    with files.atomic_folder(tmp_path / name) as folder:
        (folder / "inside").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == [name]
