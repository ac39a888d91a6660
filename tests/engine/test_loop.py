"""The loop on a toy task: exact resume from anywhere, order of events, signals, non-finite steps, accumulation."""

import io
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.engine import toy
from tests.engine.toy import final_of, go, rows_of, same

from quintic.core import CheckpointError
from quintic.engine import loop, saving
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.progress import Display
from quintic.engine.run import Run


def test_a_whole_run(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 12]
    assert rows[-1]["val_loss"] < rows[4]["val_loss"]
    assert [row["calls"] for row in rows] == list(range(1, 13))
    assert json.loads((whole.folder / "run.json").read_text()) == {"status": "finished", "steps": 12}
    assert json.loads((whole.folder / "machine.json").read_text())["torch"] == torch.__version__
    assert [path.name for path in whole.samples.iterdir()] == ["step-000012.txt"]
    assert list(list_checkpoints(whole.checkpoints)) == [7, 10, 12]  # 7: before the rate falls


@pytest.mark.parametrize("at", ["before_save", "in_save", "after_save", "in_evaluation", "in_sample", "in_metrics"])
@pytest.mark.parametrize("step", [3, 5, 10, 12])
def test_a_crash_anywhere_resumes_bit_for_bit(tmp_path, monkeypatch, whole, at, step):
    """Raise at one point of one step, as a kill would; then resume and compare everything with the whole run."""
    settings, run = toy.toy_run(tmp_path / "crashed", *(["engine.sample_every=5"] if at == "in_sample" else []))
    if at == "in_sample":
        shutil.rmtree(whole.folder)
        reference = toy.toy_run(tmp_path / "whole", "engine.sample_every=5")
        go(toy.ToyTask(), *reference)
        whole = reference[1]

    class Crash(BaseException):
        pass

    task = toy.ToyTask()

    def crashing(function, when=lambda *a: True):
        def wrapped(*args, **kwargs):
            if task.steps == step and when(*args):
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if at == "before_save":
            patch.setattr(loop.Saver, "save", crashing(loop.Saver.save))
        elif at == "in_save":
            patch.setattr(saving, "sha256_file", crashing(saving.sha256_file, lambda path: path.name == "state.json"))
        elif at == "after_save":
            patch.setattr(
                loop, "due_after", crashing(loop.due_after, lambda *_: (run.checkpoints / f"step-{step}").exists())
            )
        elif at == "in_evaluation":
            task.evaluate = crashing(task.evaluate)
        elif at == "in_sample":
            task.sample = crashing(task.sample)
        else:
            patch.setattr(loop.MetricsFile, "append", crashing(loop.MetricsFile.append))
        try:
            go(task, settings, run)
            crashed = False
        except Crash:
            crashed = True
    if step == 3:
        assert crashed == (at == "in_metrics")  # nothing else is due at step 3
    else:
        assert crashed
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished
    same(run, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resumes_bit_for_bit(tmp_path, whole, number):
    settings, run = toy.toy_run(tmp_path / "stopped")
    task = toy.ToyTask()
    plain = task.after_step

    def after_step(model, progress):
        if task.steps == 6:
            os.kill(os.getpid(), number)
        return plain(model, progress)

    task.after_step = after_step
    before = signal.getsignal(number)
    outcome = go(task, settings, run)
    assert (outcome.finished, outcome.step) == (False, 7)
    assert signal.getsignal(number) is before
    assert json.loads((run.folder / "run.json").read_text())["status"] == "stopped"
    assert 7 in list_checkpoints(run.checkpoints)
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished
    same(run, whole)


def test_a_stop_during_evaluation_is_quick_and_resumes(tmp_path, whole):
    settings, run = toy.toy_run(tmp_path / "stopped")
    task = toy.ToyTask()
    task.stop_evaluations = True
    outcome = go(task, settings, run)
    assert (outcome.finished, outcome.step) == (False, 5)
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    go(toy.ToyTask(), settings, Run.open(run.folder))
    same(run, whole)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    before = final_of(whole), rows_of(whole)
    settings, _ = toy.toy_run(tmp_path / "other")
    outcome = go(toy.ToyTask(), settings, Run.open(whole.folder))
    assert outcome.finished and (final_of(whole), rows_of(whole))[1] == before[1]


def test_non_finite_stops_before_the_update(tmp_path):
    settings, run = toy.toy_run(tmp_path / "nan")
    task = toy.ToyTask()
    task.poison_step = 7
    with pytest.raises(loop.TrainingError, match=r"step 8.*not finite.*lower optim\.lr") as stopped:
        go(task, settings, run)
    numbers = loop.Order(task.num_examples, 0, task.fingerprint).examples(7 * 8, 8).tolist()
    assert f"examples were {', '.join(map(str, numbers))}." in str(stopped.value)
    assert [row["step"] for row in rows_of(run)] == list(range(1, 8))
    weights = load_file(run.checkpoints / "step-5" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    facts = json.loads((run.folder / "run.json").read_text())
    assert (facts["status"], facts["error"]) == ("failed", str(stopped.value))
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["status"] == "finished" and "error" not in facts


def test_micro_batches_give_the_same_training(tmp_path):
    class NoDropout(toy.ToyTask):
        def loss(self, model, batch):
            model.eval()
            return super().loss(model, batch)

    losses = []
    for size in (0, 3):
        settings, run = toy.toy_run(tmp_path / str(size), f"engine.micro_batch_size={size}", "engine.dtype=float64")
        task = NoDropout()
        task.x, task.y = task.x.double(), task.y.double()
        go(task, settings, run)
        losses.append([row["loss"] for row in rows_of(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_noticed(tmp_path, whole, number):
    """While the model is built or loaded, which takes minutes for a large one."""
    screen = io.StringIO()
    settings, run = toy.toy_run(tmp_path / "early")
    task = toy.ToyTask()
    plain = task.build
    task.build = lambda *a, **k: (os.kill(os.getpid(), number), plain(*a, **k))[1]
    outcome = loop.train(task, settings, run, Console(file=screen, width=200), quiet_peak=True)
    assert (outcome.finished, outcome.step, task.steps) == (False, 0, 0)
    assert run.facts()["status"] == "stopped"
    assert f"{signal.Signals(number).name}: saving and stopping" in screen.getvalue()
    assert ("Ctrl-C again" in screen.getvalue()) == (number == signal.SIGINT)
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished
    same(run, whole)


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    go(toy.ToyTask(), *toy.toy_run(tmp_path / "rng"))
    assert torch.equal(torch.rand(3), expected)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, whole):
    settings, run = toy.toy_run(tmp_path / "full")
    plain = saving.sha256_file

    def full(path):
        if "step-10" in str(path):
            raise OSError(28, "No space left")
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "sha256_file", full)
        with pytest.raises(OSError, match="No space"):
            go(toy.ToyTask(), settings, run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-5", "step-7"]
    go(toy.ToyTask(), settings, Run.open(run.folder))
    same(run, whole)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, whole):
    class Wider(toy.ToyTask):
        def build(self, *args, **options):
            model = super().build(*args, **options)
            model.head = torch.nn.Parameter(torch.zeros(5, 4))
            return model

    settings, _ = toy.toy_run(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"head is \(3, 4\) there and \(5, 4\) here"):
        go(Wider(), settings, whole)


def test_a_terminal_gets_a_live_bar_and_lines_above_it(tmp_path):
    screen = io.StringIO()
    settings, run = toy.toy_run(tmp_path / "live")
    console = Console(file=screen, force_terminal=True, width=120)
    loop.train(toy.ToyTask(), settings, run, console, quiet_peak=True)
    shown = screen.getvalue()
    assert "12/12" in shown and "\x1b[" in shown
    assert "validation loss" in shown and "step 1/12  loss" not in shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bar_fits_the_terminal(width):
    """Count and time left are never squeezed out by the numbers behind them."""
    screen = io.StringIO()
    display = Display(Console(file=screen, force_terminal=True, width=width), 1200)
    row = {"step": 700, "loss": 2.7815, "bits_per_byte": 1.5451, "lr": 5.3e-5, "grad_norm": 0.26, "max_vio": [0.27],
           "tokens_per_second": 17615.0, "mfu": 0.25}  # fmt: skip
    with display.live(699) as shown:
        shown.step(row)
        shown._bar.refresh()
    last = screen.getvalue()
    assert " 700/1200" in last and "-:--:--" in last and "…" not in last and "loss 2.78" in last
    assert ("MFU 25%" in last) == (width == 200)


def test_averaged_weights_are_validated_saved_and_resumed(tmp_path, whole):
    """The average follows from the weights of every step; training itself does not change."""
    settings, run = toy.toy_run(
        tmp_path / "ema", "engine.ema_decay=0.5", "engine.checkpoint_every=1", "engine.keep_last=12"
    )
    task = toy.ToyTask()
    validated = []
    plain = task.evaluate
    task.evaluate = lambda model, *a: (validated.append(model.weight.detach().clone()), plain(model, *a))[1]
    go(task, settings, run)
    weights = {n: load_file(p / "model.safetensors")["weight"] for n, p in list_checkpoints(run.checkpoints).items()}
    average = task.build(0).weight.detach()
    for step in range(1, 13):
        decay = min(0.5, step / (9 + step))
        average = decay * average + (1 - decay) * weights[step]
    assert torch.allclose(load_file(run.checkpoints / "step-12" / "average.safetensors")["weight"], average, atol=1e-6)
    assert torch.allclose(validated[-1], average, atol=1e-6) and not torch.allclose(average, weights[12], atol=1e-4)
    model = task.build(initialize=False)
    loop.load_model(run.checkpoints / "step-12", model, averaged=True)
    assert torch.allclose(model.weight, average, atol=1e-6)
    assert torch.equal(weights[12], final_of(whole)[0]["weight"])

    for step in range(8, 13):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    go(toy.ToyTask(), settings, Run.open(run.folder))
    again = load_file(run.checkpoints / "step-12" / "average.safetensors")["weight"]
    assert torch.allclose(again, average, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"engine\.ema_decay cannot be switched"):
        go(toy.ToyTask(), settings.derive("engine.ema_decay", 0.0, "test"), Run.open(run.folder))


def test_a_bad_step_can_be_skipped(tmp_path):
    settings, run = toy.toy_run(
        tmp_path / "skip", "engine.on_nonfinite=skip", "engine.checkpoint_every=1", "engine.keep_last=12"
    )
    task = toy.ToyTask()
    task.poison_step = 7
    assert go(task, settings, run).finished
    rows = rows_of(run)
    assert [row["step"] for row in rows if "skipped_examples" in row] == [8]
    assert len(rows[7]["skipped_examples"]) == 8 and rows[7]["loss"] is None
    weights = [load_file(run.checkpoints / f"step-{n}" / "model.safetensors")["weight"] for n in (7, 8, 9)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_too_many_bad_steps_stop_the_run(tmp_path):
    settings, run = toy.toy_run(tmp_path / "skip", "engine.on_nonfinite=skip", "engine.max_skips=2")
    task = toy.ToyTask()
    plain = task.loss
    task.loss = lambda model, batch: replace(plain(model, batch), total=model.weight.sum() * float("inf"))
    with pytest.raises(loop.TrainingError, match=r"3 steps in a row.*max_skips = 2"):
        go(task, settings, run)


def test_two_processes_on_one_run_are_refused(tmp_path):
    settings, run = toy.toy_run(tmp_path / "busy")
    with run.locked(), pytest.raises(CheckpointError, match="another process is training"):
        go(toy.ToyTask(), settings, Run.open(run.folder))
    assert go(toy.ToyTask(), settings, Run.open(run.folder)).finished


def test_no_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    import quintic.engine.checkpoint as module

    settings, run = toy.toy_run(tmp_path / "full")
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(CheckpointError, match=r"1 MiB free and a checkpoint needs 2 MiB; make room and resume"):
        go(toy.ToyTask(), settings, run)
    assert list(run.checkpoints.iterdir()) == []


def test_a_run_can_be_cut_at_a_step(tmp_path, whole):
    settings, run = toy.toy_run(tmp_path / "cut")
    outcome = loop.train(toy.ToyTask(), settings, run, Console(file=io.StringIO()), quiet_peak=True, stop_at=7)
    assert (outcome.finished, outcome.step, outcome.recorded) == (False, 7, 7)
    go(toy.ToyTask(), settings, Run.open(run.folder))
    same(run, whole)


ADAPTIVE = ("optim.clip=adaptive", "optim.clip_norm=inf", "optim.clip_quantile=0.5", "optim.clip_window=10")


@pytest.mark.parametrize("kind", [ADAPTIVE, ("optim.clip=spectral",), ("optim.decay=spectral",)], ids=lambda k: k[0])
def test_every_kind_of_clipping_and_decay_resumes_bit_for_bit(tmp_path, kind):
    runs = []
    for name in ("whole", "cut"):
        settings, run = toy.toy_run(tmp_path / name, *kind, "engine.diagnose_every=4")
        go(toy.ToyTask(), settings, run)
        runs.append(run)
    shutil.rmtree(runs[1].checkpoints / "step-12")
    go(toy.ToyTask(), settings, Run.open(runs[1].folder))
    same(*runs)
    rows = rows_of(runs[0])
    assert [row["step"] for row in rows if "svd_entropy" in row] == [4, 8, 12]
    assert rows[3]["predicted_change"] < 0 and rows[3]["orthogonalized_matrices"] == rows[3]["muon_matrices"] == 1
    assert sum(rows[3]["layer_share"].values()) == pytest.approx(1.0)
    thresholds = {row["clip_threshold"] for row in rows}
    assert len(thresholds) > 5 if kind == ADAPTIVE else thresholds == {1.0}
