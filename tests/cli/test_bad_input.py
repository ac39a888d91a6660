"""Bad input: one short message with the next step, exit code 2, nothing written, nothing lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.command import quintic

from quintic.engine.metrics import read_metrics

SMALL = ["--size", "tiny", "engine.steps=6", "engine.checkpoint_every=2"]
TEXT = "the whale swam under the ship and the captain looked at the sea.\n" * 40


def fails(capsys, *arguments):
    code, captured = quintic(*arguments), capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return " ".join(captured.err.split())


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(book, tmp_path, capsys):
    assert quintic("train", book, *SMALL, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "no such file or folder: nowhere.txt"),
        (["BOOK", "optim.lrr=0.1"], "unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["BOOK", "optim.lr=fast"], "setting 'optim.lr' must be of type float, found 'fast'"),
        (["BOOK", "lm.num_experts=2.5"], "setting 'lm.num_experts' must be of type int, found 2.5"),
        (["BOOK", "lr=0.1"], "unknown setting 'lr'; did you mean 'optim.lr'?"),
        (["BOOK", "a-b=0.1"], "'a-b=0.1' is not a setting; write section.field=value"),
        (["BOOK", "optim.learning_rate=0.1"], "unknown setting 'optim.learning_rate'; did you mean 'optim.lr'?"),
        (["BOOK", "lm.hidden_size=64"], "did you mean 'lm.d_model'?"),
        (["BOOK", "--max-steps", "5"], "settings have no dashes: engine.steps=..."),
        (["BOOK", "--lr=0.1"], "settings have no dashes: optim.lr=..."),
        (["BOOK", "lm.top_k=9"], "lm.top_k must be between 1 and num_experts = 8, found 9"),
        (["BOOK", "optim.name=muonn"], "did you mean 'muon'?"),
        (["BOOK", "--size", "tinny"], "unknown size 'tinny' for task lm; did you mean 'tiny'?"),
        (["BOOK", "--task", "lmm"], "unknown task 'lmm'; did you mean 'lm'?"),
        (["BOOK", "--device", "cuda:9"], "not available on this machine"),
        (["BOOK", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["BOOK", "--bogus"], "--bogus"),
        (["BOOK", "--log", "wandb"], "where metrics go besides the run folder: --tracker"),
        (["BOOK", "lm.vocab_size=100"], "lm.vocab_size = 100 is below the tokenizer's 257 tokens"),
        (["BOOK", "data.tokenizer=missing.json"], "no tokenizer at missing.json"),
        (["BOOK", "data.encoding=klingon"], "unknown encoding 'klingon'"),
        (["BOOK", "lm.rope_theta=0"], "lm.rope_theta must be above 0 and finite, found 0.0"),
        (["BOOK", "lm.norm_eps=-1"], "lm.norm_eps must be at least 0 and finite, found -1.0"),
        (["BOOK", "lm.route_scale=nan"], "lm.route_scale must be at least 0 and finite, found nan"),
        (
            ["BOOK", "data.validation_fraction=0.6", "data.test_fraction=0.4"],
            "no text is left to train on: data.validation_fraction = 0.6 and data.test_fraction = 0.4 take all of it",
        ),
        (["EMPTY"], "every document is empty"),
        (["BINARY"], "looks binary"),
        (["SHORT"], "too short to train on: 5 characters"),
        (["PHOTOS"], "too short to train on: 2 characters, at least 200 are needed; for pictures take --task tarflow"),
    ],
)
def test_train_refuses(tmp_path, book, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "readme.txt").write_text("hi")
    (tmp_path / "photos" / "1.JPG").write_bytes(b"\xff\xd8")
    named = {word: str(tmp_path / f"{word.lower()}.txt") for word in ("BOOK", "EMPTY", "BINARY", "SHORT")}
    named["PHOTOS"] = str(tmp_path / "photos")
    arguments = [named.get(argument, argument) for argument in arguments]
    size = [] if "--size" in arguments else ["--size", "tiny"]
    assert message in fails(capsys, "train", *arguments, *size, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_out_that_holds_a_run_or_something_else(run, book, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "holds a run already; continue it with: quintic resume" in fails(capsys, "train", book, *SMALL, "--out", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "not an empty folder" in fails(capsys, "train", book, *SMALL, "--out", tmp_path)
    assert "not an empty folder" in fails(capsys, "train", book, *SMALL, "--out", book)


def test_no_permission_to_write_is_said_before_the_work(run, book, capsys, monkeypatch, tmp_path):
    (tmp_path / "table.csv").write_text("1,2,3\n4,5,6\n7,8,10\n")
    Image.new("L", (28, 28), 99).save(tmp_path / "p.png")
    monkeypatch.setattr("quintic.core.files.os.access", lambda *_: False)  # root may write anywhere
    out = tmp_path / "x" / "y"
    for command in (
        ["train", book, *SMALL, "--out", out],
        ["race", book, "--size", "tiny", "--out", out],
        ["export", run, out],
        ["generate", "ddpm/fashion28", "--out", out / "z.png"],
        ["matrix", "cur", tmp_path / "table.csv", "--rank", "2", "--out", out / "z.svg"],
        ["codec", "encode", tmp_path / "p.png", "--out", out],
        ["codec", "eval", tmp_path / "p.png", "--out", out],
    ):
        assert f"no permission to write in {tmp_path}; choose another --out" in fails(capsys, *command)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["train", "race"])
def test_names_that_no_record_could_hold(book, tmp_path, capsys, verb):
    odd = str(tmp_path / "b\udcff")  # how a file name of other bytes comes in
    assert "is not UTF-8 text, as records of a run are; rename it" in fails(
        capsys, verb, odd, "--out", tmp_path / "run"
    )
    assert "is not UTF-8 text" in fails(capsys, verb, book, "--size", "tiny", "--out", odd)
    assert "is not UTF-8 text" in fails(capsys, "report", odd)
    assert "is not UTF-8 text" in fails(capsys, "resume", odd)
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_file_in_the_place_of_a_folder(book, tmp_path, capsys):
    Image.new("L", (28, 28), 99).save(tmp_path / "p.png")
    for command in (
        ["race", book, "--size", "tiny", "--out", book],
        ["codec", "eval", tmp_path / "p.png", "--out", book],
        ["codec", "encode", tmp_path / "p.png", "--out", book / "z.qdc"],
    ):
        assert f"{book} is a file, expected a folder" in fails(capsys, *command)
    assert book.read_text() == TEXT


def test_an_ending_that_belongs_to_something_else(tmp_path, capsys):
    Image.new("L", (28, 28), 99).save(tmp_path / "p.png")
    encode = ["codec", "encode", tmp_path / "p.png", "--preset", "fast"]
    assert "expected a name that ends in .qdc, or a folder" in fails(capsys, *encode, "--out", tmp_path / "z.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png"]


def test_a_restored_picture_replaces_nothing_unasked(tmp_path, capsys):
    Image.new("L", (28, 28), 99).save(tmp_path / "p.png")
    (tmp_path / "z.png").write_bytes(b"precious")
    restore = ["codec", "restore", tmp_path / "p.png", "--task", "deblur", "--preset", "fast", "--quality", "10"]
    assert "z.png exists; --overwrite replaces it" in fails(capsys, *restore, "--out", tmp_path / "z.qdc")
    assert (tmp_path / "z.png").read_bytes() == b"precious" and not (tmp_path / "z.qdc").exists()


def test_the_codec_speaks_of_the_options_and_files_that_were_typed(tmp_path, capsys):
    Image.new("L", (28, 28), 90).save(picture := tmp_path / "p.png")
    aims = ("--target-bytes", 80, "--quality", 5)
    assert "only one of --target-bytes, --target-psnr and --quality" in fails(capsys, "codec", "encode", picture, *aims)
    assert "p.png has the ending of what is made, .png" in fails(capsys, "codec", "decode", picture, "--overwrite")
    (tmp_path / "x.qdc").write_bytes(b"abc")
    assert f"{tmp_path / 'x.qdc'}: this is no file of quintic codec" in fails(
        capsys, "codec", "info", tmp_path / "x.qdc"
    )
    assert "inpaint needs --mask, a grey picture" in fails(capsys, "codec", "restore", picture, "--task", "inpaint")
    deblur = ("--task", "deblur", "--mask", picture)
    assert "--mask belongs to --task inpaint, found --task deblur" in fails(
        capsys, "codec", "restore", picture, *deblur
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "x.qdc"]


def test_pictures_without_labels_have_no_classes(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / "flat" / f"{i}.png")
    flow = ["train", "--task", "tarflow", "--size", "tiny", tmp_path / "flat", "--out", tmp_path / "run"]
    assert "train without classes: tarflow.classes=0" in fails(capsys, *flow)
    assert not (tmp_path / "run").exists()


def unfinish(run):
    """Take away the end of a run, as if it had been killed after step 4."""
    shutil.rmtree(run / "checkpoints" / "step-6")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:5]))


@pytest.mark.parametrize("verb", ["resume", "verify-resume"])
def test_resume_takes_no_other_settings(run, capsys, verb):
    assert f"quintic train DATA --from {run} engine.steps=9" in fails(capsys, verb, run, "engine.steps=9")
    assert "no such file or folder: elsewhere" in fails(capsys, verb, run, "elsewhere")


def test_resume_finds_data_that_was_moved(run, book, tmp_path, capsys):
    unfinish(run)
    config = (run / "config.toml").read_text()
    moved = book.rename(tmp_path / "moved.txt")
    for verb in ("resume", "verify-resume"):
        message = fails(capsys, verb, run)
        assert f"no such file or folder: {book}" in message and f"quintic resume {run} PATH" in message
    (tmp_path / "other.txt").write_text(TEXT.replace("whale", "squid"))
    for verb in ("resume", "verify-resume"):
        assert "has changed since it was started" in fails(capsys, verb, run, tmp_path / "other.txt")
    assert quintic("verify-resume", run, moved, "--steps", "2") == 0
    assert (run / "config.toml").read_text() == config
    assert quintic("resume", run, moved) == 0 and len(read_metrics(run / "metrics.jsonl")) == 6
    assert (run / "config.toml").read_text() == config.replace(str(book), str(moved))
    again = moved.rename(tmp_path / "again.txt")
    assert quintic("resume", run, again) == 0 and str(again) in (run / "config.toml").read_text()
    assert quintic("evaluate", run) == 0


def test_settings_that_were_changed_by_hand_are_refused_before_they_take_memory(run, capsys):
    config = run / "config.toml"
    config.write_text(re.sub(r"^d_model = \d+", "d_model = 6400000000000", config.read_text(), flags=re.M))
    for verb in ("generate", "evaluate"):
        assert f"by the settings of {config}, does not fit the model" in fails(capsys, verb, run)


def test_a_line_of_paths_that_was_rewritten_by_hand_is_left_alone(run, tmp_path, book, capsys):
    config = run / "config.toml"
    config.write_text(config.read_text().replace(f'paths = ["{book}"]', f'paths = [\n"{book}"\n]'))
    moved = book.rename(tmp_path / "moved.txt")
    before = config.read_text()
    assert f'make it paths = ["{moved}"]' in fails(capsys, "resume", run, moved)
    assert config.read_text() == before
    config.write_text(before.replace("paths", "fingerprint = 3\npaths"))
    assert "config.toml is damaged" in fails(capsys, "resume", run)
    config.write_text(before.replace(f'"{book}"', "3"))
    assert "among its 'paths' is 3" in fails(capsys, "resume", run)


def test_resume_refuses_changed_data(run, book, capsys):
    unfinish(run)
    book.write_text(TEXT.replace("whale", "squid"))
    message = fails(capsys, "resume", run)
    assert "has changed since it was started" in message and str(book) in message
    book.unlink()
    assert "no such file or folder" in fails(capsys, "resume", run)
    assert len(read_metrics(run / "metrics.jsonl")) == 5
    book.write_text(TEXT)
    assert quintic("resume", run) == 0 and len(read_metrics(run / "metrics.jsonl")) == 6


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, capsys):
    unfinish(run)
    weights = run / "checkpoints" / "step-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    # Only step 4 is left, so nothing can be used.
    message = fails(capsys, "resume", run)
    assert "every checkpoint" in message and "start again" in message
    for verb in ("generate", "evaluate"):
        assert "every checkpoint" in fails(capsys, verb, run)


def test_damage_with_a_good_one_beside_it(book, tmp_path, capsys):
    run = tmp_path / "three"
    assert quintic("train", book, *SMALL, "engine.keep_last=3", "--out", run) == 0
    unfinish(run)
    weights = run / "checkpoints" / "step-4" / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    capsys.readouterr()
    assert quintic("resume", run) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step-4 is damaged: model.safetensors does not match its recorded hash" in out
    assert "continuing from step 2" in out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("verb", ["resume", "generate", "evaluate", "report"])
def test_folders_that_hold_no_run(tmp_path, capsys, verb):
    assert "does not exist" in fails(capsys, verb, tmp_path / "nothing")
    assert "no run" in fails(capsys, verb, tmp_path)


def test_a_damaged_configuration(run, capsys):
    (run / "config.toml").write_text("[engine\n")
    for verb in ("resume", "generate"):
        assert "config.toml is damaged" in fails(capsys, verb, run)


def test_generate_and_evaluate_refuse_nonsense(run, capsys):
    assert "no checkpoint '99'; expected best, last or one of the saved steps: 4, 6" in fails(
        capsys, "generate", run, "--checkpoint", "99"
    )
    assert "top_p must be in (0, 1]" in fails(capsys, "generate", run, "--top-p", "0")
    assert "unknown split 'tests'; did you mean 'test'?" in fails(capsys, "evaluate", run, "--split", "tests")
    assert "no such file" in fails(capsys, "evaluate", run, "missing.txt")
    assert "data.field is for other text, and none is named" in fails(capsys, "evaluate", run, "data.field=body")
    said = fails(capsys, "evaluate", run, run / "config.toml", "data.validation_fraction=0.5")
    assert "data.validation_fraction is a setting of training; evaluations take data.encoding or data.field" in said
    assert "did you mean 'data.field'" in fails(capsys, "evaluate", run, run / "config.toml", "data.feild=body")
    said = fails(capsys, "evaluate", "tarflow/fashion28", run / "config.toml", "data.size=8")
    assert "data.size is a setting of training; evaluations take none for images" in said


def test_a_run_killed_before_its_first_step(run, capsys):
    """What is left is the configuration alone."""
    for name in ("checkpoints", "samples"):
        shutil.rmtree(run / name)
    for name in ("metrics.jsonl", "report.html", "machine.json"):
        Path(run / name).unlink()
    assert "has no checkpoint yet" in fails(capsys, "generate", run)
    assert quintic("resume", run) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
