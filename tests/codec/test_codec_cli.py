import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tests.codec.toys import picture, smooth_model

from quintic.cli.codec import app
from quintic.codec import read_parts
from quintic.core import CodecError, ConfigError, DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smooth_model().save(tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(15, 10 + i, "L" if i else "RGB", seed=i).save(tmp_path / "in" / f"p{i}.png")
    return tmp_path


def run(*arguments):
    app([str(a) for a in arguments], exit_on_error=False, result_action="return_value")


def test_folders_and_patterns_there_and_back(folder, capsys):
    run("encode", "in", "--out", "coded", "--target-bytes", 70, "--model", "model.safetensors")
    assert "3 files" in capsys.readouterr().out
    files = sorted((folder / "coded").glob("*.qdc"))
    assert len(files) == 3 and all(f.stat().st_size <= 70 for f in files)
    run("decode", "coded/*.qdc", "--out", "back", "--model", "model.safetensors")
    for i in range(3):
        with Image.open(folder / "back" / f"p{i}.png") as back, Image.open(folder / "in" / f"p{i}.png") as original:
            assert (back.size, back.mode) == (original.size, original.mode)
            assert np.square(np.asarray(back, float) - np.asarray(original, float)).mean() < 900
    with pytest.raises(ConfigError, match="--overwrite"):
        run("encode", "in", "--out", "coded", "--model", "model.safetensors")


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(folder, capsys):
    (folder / "in" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 4 pictures could not be coded"):
        run("encode", "in", "--out", "coded", "--target-bytes", 70, "--model", "model.safetensors")
    assert len(list((folder / "coded").glob("*.qdc"))) == 3 and "a.png" in capsys.readouterr().err


def test_a_file_larger_than_the_picture_is_told(folder, capsys):
    for size, told in ((2000, True), (20, False)):
        target = folder / f"{size}.qdc"
        run("encode", "in/p1.png", "--out", target.name, "--target-bytes", size, "--model", "model.safetensors")
        before = (folder / "in" / "p1.png").stat().st_size
        assert (target.stat().st_size > before) == told
        assert (
            f"larger than in/p1.png, which has {before} bytes" in capsys.readouterr().err.replace("\n", " ")
        ) == told


def test_info_needs_no_model(folder, capsys):
    run("encode", "in/p1.png", "--out", "a.qdc", "--quality", 30, "--robust", "--model", "model.safetensors")
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    run("info", "a.qdc", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["width"], facts["height"], facts["mode"], facts["robust"]) == (15, 11, "L", True)
    assert facts["state"] == "whole" and facts["bytes"] == (folder / "a.qdc").stat().st_size
    data = (folder / "a.qdc").read_bytes()
    (folder / "a.qdc").write_bytes(data[:-3])
    run("info", "a.qdc")
    assert "cut" in capsys.readouterr().out


def test_info_does_not_import_torch(folder):
    run("encode", "in/p1.png", "--out", "a.qdc", "--model", "model.safetensors")
    program = (
        "import sys; from quintic.cli.codec import app; app(['info', 'a.qdc'], result_action='return_value'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_cut_file_is_decoded_when_asked(folder):
    run("encode", "in/p1.png", "--out", "a.qdc", "--model", "model.safetensors")
    data = (folder / "a.qdc").read_bytes()
    (folder / "a.qdc").write_bytes(data[: len(data) // 2 + 8])
    with pytest.raises(CodecError, match="--partial"):
        run("decode", "a.qdc", "--model", "model.safetensors")
    assert not (folder / "a.png").exists()
    run("decode", "a.qdc", "--partial", "--model", "model.safetensors")
    assert Image.open(folder / "a.png").size == (15, 11)


def test_one_bad_file_is_named_and_does_not_stop_the_others(folder, capsys):
    run("encode", "in", "--out", "coded", "--model", "model.safetensors")
    (folder / "coded" / "p1.qdc").write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 3 files"):
        run("decode", "coded", "--out", "back", "--model", "model.safetensors")
    assert sorted(p.name for p in (folder / "back").iterdir()) == ["p0.png", "p2.png"]
    assert "p1.qdc: this is no file of quintic codec" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 3 files"):
        run("info", "coded", "--json")
    told = capsys.readouterr()
    assert [json.loads(line)["file"][-6:] for line in told.out.splitlines()] == ["p0.qdc", "p2.qdc"]
    assert "p1.qdc: this is no file of quintic codec" in told.err


def test_eval_counts_the_bytes_of_real_files(folder, capsys):
    run("eval", "in", "--out", "e", "--sizes", 60, "--sizes", 90, "--model", "model.safetensors")
    rows = json.loads((folder / "e" / "rates.json").read_text())
    names = {row["codec"] for row in rows}
    assert {"quintic", "jpeg", "webp"} <= names and all(row["pictures"] == 3 for row in rows)
    own = [row for row in rows if row["codec"] == "quintic"]
    assert own[0]["bytes"] <= 60 and own[1]["psnr"] > own[0]["psnr"]
    jpeg = [row for row in rows if row["codec"] == "jpeg"]
    assert min(row["bytes"] for row in jpeg) > 150  # its tables alone
    assert (
        "<svg" in (folder / "e" / "rates.html").read_text() and "| quintic |" in (folder / "e" / "rates.md").read_text()
    )


def test_eval_names_the_picture_that_is_too_large_for_a_size(folder):
    picture(150, 150, "RGB", seed=9).save(folder / "in" / "p9.png")
    with pytest.raises(ConfigError, match=r"p9\.png: "):
        run("eval", "in", "--out", "e", "--sizes", 30, "--model", "model.safetensors")
    assert not (folder / "e").exists()


def test_restore_writes_the_file_and_what_it_decodes_to(folder):
    mask = np.full((11, 15), 127, np.uint8)  # the darkest and the lightest that are taken for black and white
    mask[:, ::2] = 128
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.where(mask > 127, 255, 0).astype(np.uint8)).save(folder / "clear.png")
    run("restore", "in/p1.png", "--task", "inpaint", "--mask", "mask.png", "--out", "r.qdc",
        "--model", "model.safetensors")  # fmt: skip
    run("decode", "r.qdc", "--out", "again.png", "--model", "model.safetensors")
    assert (folder / "again.png").read_bytes() == (folder / "r.png").read_bytes()
    assert read_parts((folder / "r.qdc").read_bytes()).header.width == 15
    run("restore", "in/p1.png", "--task", "inpaint", "--mask", "clear.png", "--out", "other.qdc",
        "--model", "model.safetensors")  # fmt: skip
    assert (folder / "other.qdc").read_bytes() == (folder / "r.qdc").read_bytes()
    with pytest.raises(ConfigError, match="--mask"):
        run("restore", "in/p1.png", "--task", "inpaint", "--model", "model.safetensors")
    with pytest.raises(ConfigError, match="did you mean 'deblur'"):
        run("restore", "in/p1.png", "--task", "deblurr", "--model", "model.safetensors")


def test_mistakes_are_named(folder):
    with pytest.raises(DataError, match=r"no such file or folder: nothing\.png"):
        run("encode", "nothing.png", "--model", "model.safetensors")
    (folder / "x.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot read"):
        run("encode", "x.png", "--model", "model.safetensors")
    with pytest.raises(ConfigError, match="at least one"):
        run("encode", "--model", "model.safetensors")
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"run is a run, .* quintic codec model run --out"):
        run("encode", "in", "--out", "coded", "--model", "run")


def test_under_out_files_lie_as_they_lie_in_their_folders(folder):
    for place in ("in/more/p1.png", "other/p0.png", "other/q.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        picture(15, 10).save(folder / place)
    picture(15, 10).save(folder / "in" / "p1.bmp")
    options = "--target-bytes", 40, "--preset", "fast", "--model", "model.safetensors"
    run("encode", "in", "other", "--out", "coded", *options)
    there = sorted(str(p.relative_to(folder / "coded")) for p in (folder / "coded").rglob("*.qdc"))
    assert there == ["in/p0.qdc", "more/p1.qdc", "other/p0.qdc", "p1.bmp.qdc", "p1.png.qdc", "p2.qdc", "q.qdc"]
    run("encode", "in/**/p1.png", "--out", "pattern", *options)
    assert sorted(str(p.relative_to(folder / "pattern")) for p in (folder / "pattern").rglob("*.qdc")) == [
        "more/p1.qdc", "p1.qdc"
    ]  # fmt: skip
    run("decode", "coded", "--out", "back", "--model", "model.safetensors")
    back = sorted(str(p.relative_to(folder / "back")) for p in (folder / "back").rglob("*.png"))
    assert back == [name.replace(".qdc", ".png") for name in there]
    (folder / "in" / "in").mkdir()
    picture(15, 10).save(folder / "in" / "in" / "p0.png")
    with pytest.raises(ConfigError, match=r"in/in/p0\.png and in/p0\.png would both become x/in/p0\.png\.qdc"):
        run("encode", "in", "other", "--out", "x", *options)


def test_damaged_pictures_do_not_end_a_batch(folder, capsys):
    picture(15, 10).save(folder / "in" / "a.jpg", exif=b"Exif\0\0MM\0*\0")
    data = bytearray((folder / "in" / "p1.png").read_bytes())
    data[20:24] = (0).to_bytes(4, "big")  # its height
    (folder / "in" / "b.png").write_bytes(data)
    with pytest.raises(DataError, match="2 of 5 pictures could not be coded"):
        run("encode", "in", "--out", "coded", "--target-bytes", 40, "--preset", "fast", "--model", "model.safetensors")
    told = capsys.readouterr().err
    assert "in/a.jpg: cannot read the picture, or which side of it is up" in told and "in/b.png" in told
    assert len(list((folder / "coded").glob("*.qdc"))) == 3


def test_more_bytes_than_help_are_said_and_not_used(folder, capsys):
    run("encode", "in/p1.png", "--target-bytes", 9000, "--preset", "fast", "--model", "model.safetensors")
    size = (folder / "in" / "p1.qdc").stat().st_size
    assert f"dB; more bytes do not help: {size} of 9000 used" in capsys.readouterr().out


def test_info_names_the_models_of_this_package(folder, capsys):
    for name, mode in (("grey", "L"), ("colour", "RGB")):
        Image.new(mode, (5, 5)).save(folder / f"{name}.png")
        run("encode", f"{name}.png", "--target-bytes", 20, "--preset", "fast")
    run("encode", "in/p1.png", "--out", "own.qdc", "--target-bytes", 40, "--model", "model.safetensors")
    capsys.readouterr()
    run("info", "grey.qdc", "colour.qdc", "own.qdc", "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [facts["model"].split(",")[0] for facts in found[:2]] == ["fashion28", "emoji32"]
    assert found[2]["model"] == "not one of this package; give it with --model" and len(found[2]["fingerprint"]) == 4


def test_restore_refuses_what_it_would_spoil(folder):
    Image.new("I;16", (12, 12), 1000).save(folder / "deep.png")
    picture(12, 12, "RGBA").save(folder / "clear.png")
    opaque = picture(12, 12, "LA")
    opaque.putalpha(255)
    opaque.save(folder / "opaque.png")
    options = "--target-bytes", 40, "--preset", "fast", "--model", "model.safetensors"
    with pytest.raises(DataError, match=r"deep\.png: .* more than 8 bits per channel"):
        run("restore", "deep.png", "--task", "deblur", *options)
    with pytest.raises(DataError, match=r"deep\.png: .* more than 8 bits per channel"):
        run("restore", "opaque.png", "--task", "inpaint", "--mask", "deep.png", *options)
    with pytest.raises(DataError, match=r"clear\.png is transparent, and only colours can be restored"):
        run("restore", "clear.png", "--task", "deblur", *options)
    with pytest.raises(ConfigError, match="must be positive numbers, found nan"):
        run("restore", "opaque.png", "--task", "deblur", "--sigma", "nan", *options)
    run("restore", "opaque.png", "--task", "deblur", *options)
    with Image.open(folder / "opaque.deblur.png") as made:
        assert (made.mode, made.size) == ("L", (12, 12))


def test_of_a_picture_with_frames_the_first_is_coded_and_that_is_said(folder, capsys):
    frames = [picture(15, 10, "L", seed=i) for i in (5, 6)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.png")
    for name in ("moving", "still"):
        run("encode", f"{name}.png", "--target-bytes", 60, "--model", "model.safetensors")
    assert (folder / "moving.qdc").read_bytes() == (folder / "still.qdc").read_bytes()
    assert " ".join(capsys.readouterr().err.split()) == "moving.png has 2 frames; only the first one is taken"
