"""A run trained longer: from the last step before the rate fell, exactly as one that was meant to be as long."""

import shutil
from itertools import pairwise

import pytest
from rich.console import Console
from tests.engine.toy import ToyTask, toy_run

from quintic.core import CheckpointError, ConfigError
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.extension import extend_run
from quintic.engine.loop import train
from quintic.engine.metrics import read_metrics
from quintic.engine.verification import differences

FLAT = ("optim.warmup_fraction=0", "optim.decay_fraction=0.5", "engine.eval_every=0")


def go(settings, run):
    return train(ToyTask(), settings, run, Console(quiet=True), quiet_peak=True)


def longer(run, folder, settings, steps, say=lambda _: None, planned=12):
    settings = settings.derive("engine.steps", steps, "given")
    return settings, extend_run(run, folder, settings, run.header(), planned, say)


@pytest.fixture
def short(tmp_path):
    settings, run = toy_run(tmp_path / "short", *FLAT)
    go(settings, run)
    return settings, run


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_equals_a_run_that_was_meant_to_be_as_long(tmp_path, ema):
    settings, run = toy_run(tmp_path / "short", *FLAT, f"engine.ema_decay={ema}")
    go(settings, run)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    said = []
    settings, extended = longer(run, tmp_path / "long", settings, 20, said.append)
    assert go(settings, extended).finished
    uncut, whole = toy_run(tmp_path / "whole", *FLAT, "engine.steps=20", f"engine.ema_decay={ema}")
    go(uncut, whole)
    count, wrong = differences(whole, extended)
    # The short run wrote the row of its sixth step while it knew of no validation there; the long one neither.
    assert count > 5 and not wrong
    assert said == [f"going on from step 6 of {run.folder}"]
    assert before == {path: path.read_bytes() for path in before}
    assert extended.header()["extends"] == str(run.folder) and extended.header()["extends_step"] == 6
    assert extended.facts()["status"] == "finished" and extended.facts()["steps"] == 20


def test_the_checkpoint_before_the_rate_falls_is_kept(tmp_path, short):
    settings, run = short
    assert list(list_checkpoints(run.checkpoints)) == [6, 10, 12]
    for number, words in enumerate((("engine.keep_stable=false",), ("optim.schedule=cosine",))):
        settings, run = toy_run(tmp_path / f"not-{number}", *FLAT, *words)
        go(settings, run)
        assert list(list_checkpoints(run.checkpoints)) == [10, 12]


def test_without_it_the_oldest_later_one_serves_and_the_jump_of_the_rate_is_told(tmp_path, short):
    settings, run = short
    shutil.rmtree(run.checkpoints / "step-6")
    said = []
    settings, extended = longer(run, tmp_path / "long", settings, 30, said.append)
    assert "going on from step 10" in said[0] and "it begins again with 1" in said[0]
    go(settings, extended)
    rows = read_metrics(extended.metrics_file)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[9]["lr"] < rows[5]["lr"] == rows[10]["lr"]


def test_a_damaged_one_is_passed_over(tmp_path, short):
    settings, run = short
    (run.checkpoints / "step-6" / "model.safetensors").write_bytes(b"")
    said = []
    longer(run, tmp_path / "long", settings, 20, said.append)
    assert "step-6 is damaged" in said[0] and "from step 10" in said[1]


def test_a_stopped_run_goes_on_from_its_newest_checkpoint(tmp_path):
    settings, run = toy_run(tmp_path / "short", *FLAT, "engine.checkpoint_every=2")
    train(ToyTask(), settings, run, Console(quiet=True), quiet_peak=True, stop_at=5)
    _, extended = longer(run, tmp_path / "long", settings, 20)
    assert list(list_checkpoints(extended.checkpoints)) == [5]


def test_cosine_goes_on_from_the_end(tmp_path):
    settings, run = toy_run(tmp_path / "short", "optim.schedule=cosine")
    go(settings, run)
    said = []
    settings, extended = longer(run, tmp_path / "long", settings, 24, said.append)
    go(settings, extended)
    assert "from step 12" in said[0] and "had come down to" in said[0]
    rates = [row["lr"] for row in read_metrics(extended.metrics_file)[12:]]
    assert all(one > two for one, two in pairwise(rates))


def test_refusals_leave_nothing_behind(tmp_path, short):
    settings, run = short
    for steps in (1, 12):
        with pytest.raises(ConfigError, match="12 steps already"):
            longer(run, tmp_path / "long", settings, steps)
    with pytest.raises(CheckpointError, match="holds a run already"):
        longer(run, run.folder, settings, 20)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        longer(run, tmp_path / "long", settings, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short"]
