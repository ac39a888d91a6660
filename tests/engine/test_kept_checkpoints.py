"""Which checkpoints are kept, which of them is the best, and what a run does whose checkpoints are gone or moved."""

import io
import json
import shutil

import pytest
from rich.console import Console
from tests.engine import toy
from tests.engine.toy import go, same

from quintic.core import CheckpointError
from quintic.engine import loop, saving
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.run import Run


def test_best_and_newest_checkpoints_are_kept(tmp_path):
    settings, run = toy.toy_run(
        tmp_path / "keep", "engine.checkpoint_every=2", "engine.eval_every=2", "engine.keep_last=1"
    )
    task = toy.ToyTask()
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 5.0, 10: 4.0, 12: 4.0}
    task.evaluate = lambda *_: {"val_loss": losses[task.steps]}
    go(task, settings, run)
    assert list(list_checkpoints(run.checkpoints)) == [4, 7, 12]  # 7: before the rate falls
    assert run.best_step() == 4


BETWEEN = ("engine.eval_every=4", "engine.sample_every=4", "engine.keep_last=1", "engine.keep_stable=false")
"""Validated at steps 4, 8 and 12, saved at 5, 10 and 12."""


def losses_of(task, losses):
    """Validation losses by step, of which a resumed task has taken some before."""
    task.evaluate = lambda model, *_: {"val_loss": losses[int(model.calls)]}
    return task


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({4: 3.0, 8: 6.0, 12: 5.0}, [4, 12]),
        ({4: 3.0, 8: 2.0, 12: 5.0}, [8, 12]),
        ({4: 3.0, 8: 3.0, 12: 3.0}, [12]),
        ({4: float("nan"), 8: float("nan"), 12: 3.0}, [12]),
    ],
)
def test_best_is_kept_whatever_the_periods(tmp_path, losses, kept):
    settings, run = toy.toy_run(tmp_path / "between", *BETWEEN)
    go(losses_of(toy.ToyTask(), losses), settings, run)
    assert list(list_checkpoints(run.checkpoints)) == kept and run.best_step() == kept[0]
    row = json.loads((run.checkpoints / f"step-{kept[0]}" / "state.json").read_text())["row"]
    assert kept[0] == 12 or row["val_loss"] == losses[kept[0]]


@pytest.mark.parametrize("at", ["in_save", "in_sample", "in_metrics", "next_step"])
def test_a_crash_around_the_save_of_the_best_resumes_bit_for_bit(tmp_path, monkeypatch, at):
    losses = {4: 3.0, 8: 2.0, 12: 5.0}
    settings, whole = toy.toy_run(tmp_path / "whole", *BETWEEN)
    go(losses_of(toy.ToyTask(), losses), settings, whole)
    _, run = toy.toy_run(tmp_path / "crashed", *BETWEEN)
    task = losses_of(toy.ToyTask(), losses)

    class Crash(BaseException):
        pass

    def crashing(function, step):
        def wrapped(*args):
            if task.steps == step:
                raise Crash
            return function(*args)

        return wrapped

    with monkeypatch.context() as patch:
        if at == "in_save":
            patch.setattr(saving, "sha256_file", crashing(saving.sha256_file, 8))
        elif at == "in_sample":
            task.sample = crashing(task.sample, 8)
        elif at == "in_metrics":
            patch.setattr(loop.MetricsFile, "append", crashing(loop.MetricsFile.append, 8))
        else:
            task.after_step = crashing(task.after_step, 8)
        with pytest.raises(Crash):
            go(task, settings, run)
    newest = list(list_checkpoints(run.checkpoints))[-1]
    assert newest == (5 if at == "in_save" else 8)
    assert go(losses_of(toy.ToyTask(), losses), settings, Run.open(run.folder)).finished
    same(run, whole)
    assert list(list_checkpoints(run.checkpoints)) == [8, 12]


def test_a_run_whose_checkpoints_are_gone_keeps_its_metrics(tmp_path, whole):
    settings, _ = toy.toy_run(tmp_path / "other")
    before = whole.metrics_file.read_bytes()
    shutil.rmtree(whole.checkpoints)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="reach step 12, but there is no checkpoint"):
            go(toy.ToyTask(), settings, Run.open(whole.folder))
    assert whole.metrics_file.read_bytes() == before
    whole.metrics_file.unlink()
    assert go(toy.ToyTask(), settings, Run.open(whole.folder)).finished


@pytest.mark.parametrize(
    ("words", "rows", "facts", "lost"),
    [
        ([], 4, {}, False),  # killed before the first save
        ([], 5, {}, True),
        (["engine.checkpoint_every=0"], 6, {}, False),
        (["engine.checkpoint_every=0"], 7, {}, True),  # step 7: before the rate falls
        (["engine.checkpoint_every=0", "engine.keep_stable=false"], 11, {}, False),
        (["engine.background_save=true"], 6, {}, False),  # killed while step 5 was written
        (["engine.background_save=true"], 7, {}, True),
        ([], 3, {"status": "stopped", "steps": 3}, True),  # a stop saves
        ([], 0, {"status": "stopped", "steps": 0}, False),
    ],
)
def test_only_a_run_that_has_saved_can_have_lost_its_checkpoints(tmp_path, words, rows, facts, lost):
    settings, run = toy.toy_run(tmp_path / "killed", *words)
    run.metrics_file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, rows + 1)))
    run.record(**facts)
    if lost:
        with pytest.raises(CheckpointError, match=f"reach step {rows}, but"):
            go(toy.ToyTask(), settings, run)
    else:
        assert go(toy.ToyTask(), settings, run).finished


def test_leftovers_of_a_killed_save_go(tmp_path, whole):
    """Also of a step at which nothing will be saved again, as after a signal."""
    for name in ("step-8.tmp", "step-8.0a1b2c3d.tmp"):  # the first of earlier versions
        (whole.checkpoints / name).mkdir()
        (whole.checkpoints / name / "model.safetensors").write_bytes(b"torn")
    (whole.checkpoints / "step-9.tmp").write_bytes(b"no folder, so none of ours")
    settings, _ = toy.toy_run(tmp_path / "other")
    go(toy.ToyTask(), settings, Run.open(whole.folder))
    left = sorted(path.name for path in whole.checkpoints.iterdir())
    assert left == ["step-10", "step-12", "step-7", "step-9.tmp"]


def test_checkpoints_that_were_moved_behind_links_are_read_and_pruned(tmp_path, whole):
    settings, run = toy.toy_run(tmp_path / "moved", "engine.keep_stable=false")
    loop.train(toy.ToyTask(), settings, run, Console(file=io.StringIO()), quiet_peak=True, stop_at=10)
    for name in ("step-5", "step-10", "step-12"):
        if (run.checkpoints / name).exists():
            shutil.move(run.checkpoints / name, tmp_path / name)
        (run.checkpoints / name).symlink_to(
            tmp_path / name
        )  # that of step 12 leads nowhere, as after a disk was taken out
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished
    same(run, whole)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-10", "step-12"]
    assert (tmp_path / "step-5" / "manifest.json").is_file() and not (tmp_path / "step-12").exists()
