"""quintic race on a few steps: a table, a page, run folders, and continuing where it stopped."""

import json
import shutil

import pytest
from rich.console import Console
from tests.cli.command import quintic

from quintic.cli.race import _Course, _run_one
from quintic.engine.metrics import read_metrics
from quintic.engine.race import Arm
from quintic.engine.run import Run

SHORT = ["engine.steps=6", "engine.eval_every=3", "lm.num_layers=2", "--lr", "0.01", "--lr", "0.02", "--seeds", "2"]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the whale swam under the ship and the captain looked at the sea.\n" * 40)
    return path


def test_a_race_and_its_continuation(book, tmp_path, capsys):
    out = tmp_path / "race"
    arms = ["--arm", "muon: optim.name=muon", "--arm", "adamw: optim.name=adamw optim.adamw_beta2=0.98"]
    command = ["race", book, *SHORT, *arms, "--no-match", "--out", out]
    assert quintic(*command) == 0
    shown = capsys.readouterr().out
    assert "muon" in shown and "race.html" in shown.replace("\n", "")
    result = json.loads((out / "race.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == ["muon", "adamw"]
    for arm in result["arms"]:
        assert len(arm["losses"]) == 2 and arm["mean"] == pytest.approx(sum(arm["losses"]) / 2)
        assert min(arm["sweep"].values()) == arm["losses"][0]
        assert (out / f"{arm['name']}-lr{arm['best_lr']:g}-seed1-steps6" / "config.toml").is_file()
    page = (out / "race.html").read_text()
    assert "<svg" in page and "adamw_beta2=0.98" in page and "src=" not in page
    # Take one run away: the race makes it again and comes to the same end.
    best = result["arms"][0]["best_lr"]
    shutil.rmtree(out / f"muon-lr{best:g}-seed1-steps6")
    assert quintic(*command) == 0
    again = json.loads((out / "race.json").read_text())
    assert [arm["losses"] for arm in again["arms"]] == [arm["losses"] for arm in result["arms"]]
    # Other settings in the same folder would mix two races.
    assert quintic(*command, "lm.d_model=32") == 2
    assert "trained with other settings" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "muon optim.name=muon"], "is not of the form"),
        (["--arm", "a: optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--arm", "a: optim.lr=1", "--arm", "a: optim.lr=2"], "two arms have one name"),
        (["--arm", "a: other.txt"], "may hold settings only"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_mistakes_show_before_anything_runs(book, tmp_path, capsys, arguments, message):
    assert quintic("race", book, *arguments, "--out", tmp_path / "race") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "race").exists()


def test_a_race_without_its_data_leaves_no_folder(tmp_path, capsys):
    assert quintic("race", tmp_path / "nowhere.txt", "--size", "tiny", "--out", tmp_path / "race") == 2
    assert "no such file or folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "race").exists()


def test_a_folder_that_holds_a_run_is_refused(book, tmp_path, capsys):
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    assert quintic("race", book, "--size", "tiny", "--out", tmp_path) == 2
    assert "holds a single run" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "config.toml"}


def test_a_race_goes_on_over_an_arm_that_diverges(book, tmp_path, capsys):
    arms = ["--arm", "good: lm.dense=true", "--arm", "wild: lm.route_scale=3e38"]
    short = ["engine.steps=2", "lm.num_layers=2", "--lr", "0.01", "--seeds", "2"]
    assert quintic("race", book, *short, *arms, "--out", tmp_path / "race") == 0
    result = json.loads((tmp_path / "race" / "race.json").read_text())
    assert result["winner"] == "good" and result["matches"] == []
    assert result["arms"][1]["losses"] == [float("inf")] * 2
    assert "diverged" in capsys.readouterr().out


def test_two_fractions_of_a_short_schedule_that_round_to_the_same_steps_are_one_run(book, tmp_path):
    def finish(fraction):
        settings = ["engine.steps=6", "lm.num_layers=2"]
        course = _Course(tmp_path, "lm", "tiny", [book], settings, None)
        return _run_one(Console(quiet=True), course, Arm("a", ()), 0.01, 0, fraction)

    assert finish(0.6) == finish(0.7) and finish(0.6).steps == 4  # the second one is found, not refused
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["a-lr0.01-seed0-steps4"]


def test_a_race_of_fine_tuning_starts_every_run_from_the_model(book, tmp_path, capsys):
    start, race = tmp_path / "start", tmp_path / "race"
    shape = ["engine.steps=2", "lm.num_layers=2", "lm.d_model=32"]
    assert quintic("train", book, "--size", "tiny", *shape, "--out", start) == 0
    short = ["engine.steps=2", "optim.schedule=constant", "--lr", "1e-9", "--seeds", "1", "--no-match"]
    assert quintic("race", book, *short, "--from", start, "--arm", "one: optim.name=adamw", "--out", race) == 0
    assert json.loads((race / "race.json").read_text())["arms"][0]["losses"] == pytest.approx(
        [read_metrics(start / "metrics.jsonl")[-1]["val_loss"]],
        rel=1e-3,  # the balance moves all the same
    )
    run = next(path for path in race.iterdir() if path.is_dir())
    assert Run(run).header()["from"] == str(start) and (run / "initial.safetensors").is_file()
    capsys.readouterr()
    wider = ["--arm", "wide: lm.d_model=64", "--out", tmp_path / "other"]
    assert quintic("race", book, *short, "--from", start, *wider) == 2
    assert "does not fit the model" in capsys.readouterr().err
