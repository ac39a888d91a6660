"""Sinks get the numbers of metrics.jsonl, and nothing about them can stop or change a run."""

import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.command import quintic

from quintic.core import ConfigError, MissingExtraError
from quintic.core.ranks import ALONE
from quintic.engine import loop
from quintic.engine.metrics import read_metrics
from quintic.engine.run import Run
from quintic.engine.sinks import check_sink, open_sink, scalars

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
assert _spec is not None and _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def go(run, settings, log, console=None, **more):
    return loop.train(
        toy.ToyTask(), settings, run, console or Console(file=io.StringIO()), quiet_peak=True, log=log, **more
    )


class Stub(types.ModuleType):
    """wandb or trackio as far as they are used."""

    def __init__(self, name, fail_at=None):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None, origin="a test")
        self.calls, self.fail_at = [], fail_at

    def init(self, **arguments):
        if self.fail_at == "init":
            raise RuntimeError("no key")
        self.calls.append(("init", arguments))

    def log(self, metrics, step):
        if step == self.fail_at:
            raise OSError("the network is down")
        self.calls.append((step, metrics))

    def finish(self):
        self.calls.append(("finish", {}))


def install(monkeypatch, name, **more):
    stub = Stub(name, **more)
    monkeypatch.setitem(sys.modules, name, stub)
    return stub


def events(folder):
    """{tag: {step: value}} of TensorBoard's files, those written last winning."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def expected(run):
    table = {}
    for row in read_metrics(run.metrics_file):
        for name, value in scalars(row).items():
            table.setdefault(name, {})[row["step"]] = value
    return table


def test_tensorboard_holds_the_numbers_of_the_file_across_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    settings, run = toy.toy_run(tmp_path / "run")
    go(run, settings, "tensorboard", stop_at=7)
    go(run, settings, "tensorboard")
    told, wanted = events(run.folder / "tensorboard"), expected(run)
    assert told.keys() == wanted.keys() and {"loss", "val_loss", "lr", "grad_norm"} <= told.keys()
    for name, values in wanted.items():
        assert told[name] == pytest.approx(values, rel=1e-6), name
    assert list(told["loss"]) == list(range(1, 13))


def test_what_a_killed_run_told_too_early_is_void(tmp_path):
    """Steps after the checkpoint are taken again: TensorBoard must forget the first ones."""
    pytest.importorskip("tensorboard")
    _, run = toy.toy_run(tmp_path / "run")
    sink = open_sink("tensorboard", run, 0, pytest.fail)
    for step in range(1, 5):
        sink.write({"step": step, "loss": 100.0 + step})
    sink.close()
    sink = open_sink("tensorboard", run, 2, pytest.fail)
    sink.write({"step": 3, "loss": 3.0})
    sink.close()
    assert events(run.folder / "tensorboard")["loss"] == {1: 101.0, 2: 102.0, 3: 3.0}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_sink_gets_every_row_once_and_goes_on_under_its_name(tmp_path, monkeypatch, name):
    stub = install(monkeypatch, name)
    settings, run = toy.toy_run(tmp_path / "run")
    go(run, settings, name, stop_at=5)
    go(run, settings, name)
    starts = [arguments for what, arguments in stub.calls if what == "init"]
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0]["resume"] == "allow"
    assert starts[0]["name"].startswith("run-") and starts[0]["config"]["engine"]["steps"] == 12
    rows = [(step, metrics) for step, metrics in stub.calls if isinstance(step, int)]
    assert rows == [(row["step"], scalars(row)) for row in read_metrics(run.metrics_file)]
    assert [what for what, _ in stub.calls].count("finish") == 2
    settings, other = toy.toy_run(tmp_path / "elsewhere" / "run")  # a folder called the same
    go(other, settings, name, stop_at=1)
    assert stub.calls[-3][0] == "init" and stub.calls[-3][1]["name"] != starts[0]["name"]


@pytest.mark.parametrize("fail_at", ["init", 4])
def test_a_failing_sink_is_told_of_once_and_changes_nothing(tmp_path, monkeypatch, fail_at):
    settings, plain = toy.toy_run(tmp_path / "plain")
    go(plain, settings, "")
    stub = install(monkeypatch, "wandb", fail_at=fail_at)
    settings, run = toy.toy_run(tmp_path / "run")
    console = Console(file=io.StringIO(), width=200)
    assert go(run, settings, "wandb", console).finished
    assert console.file.getvalue().count("wandb failed") == 1
    assert [step for step, _ in stub.calls if isinstance(step, int)] == ([1, 2, 3] if fail_at == 4 else [])
    untimed = [
        [
            {k: v for k, v in row.items() if "second" not in k and "share" not in k}
            for row in read_metrics(r.metrics_file)
        ]
        for r in (plain, run)
    ]
    assert untimed[0] == untimed[1]


def test_training_that_breaks_off_closes_its_sink(tmp_path, monkeypatch):
    stub = install(monkeypatch, "trackio")
    settings, run = toy.toy_run(tmp_path / "run")
    task = toy.ToyTask()
    task.poison_step = 3
    with pytest.raises(loop.TrainingError):
        loop.train(task, settings, run, Console(file=io.StringIO()), quiet_peak=True, log="trackio")
    assert [what for what, _ in stub.calls][-2:] == [3, "finish"]


def test_only_the_main_rank_tells(tmp_path, monkeypatch):
    stub = install(monkeypatch, "wandb")
    settings, run = toy.toy_run(tmp_path / "run")
    for folder in (run.checkpoints, run.samples):  # the main rank makes them
        folder.mkdir()

    class Other(type(ALONE)):
        is_main = False

    monkeypatch.setattr(loop.Saver, "save", lambda *_: None)
    go(run, settings, "wandb", ranks=Other())
    assert stub.calls == []


def test_a_sink_that_cannot_be_had_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "trackio", "wandb"):
        with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*pip install 'quintic\[{name}\]'"):
            check_sink(name)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trackio").mkdir()  # a folder is no package
    with pytest.raises(MissingExtraError):
        check_sink("trackio")
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        open_sink("tensorbord", Run(tmp_path), 0, pytest.fail)


def test_the_command_refuses_before_it_reads_any_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments in (["train", "nowhere.txt", "--size", "tiny"], ["resume", "nowhere"]):
        assert quintic(*arguments, "--tracker", "wandb") == 2
        assert "pip install 'quintic[wandb]'" in " ".join(capsys.readouterr().err.split())


def test_the_command_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "book.txt").write_text("the whale swam under the ship and the captain looked.\n" * 40)
    words = ["train", str(tmp_path / "book.txt"), "--size", "tiny", "engine.steps=2", "--tracker", "tensorboard"]
    assert quintic(*words, "--out", tmp_path / "run") == 0
    told = events(tmp_path / "run" / "tensorboard")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert told["max_vio/1"][2] == pytest.approx(rows[1]["max_vio"][1], rel=1e-6)
    assert told["val_loss"] == {2: pytest.approx(rows[1]["val_loss"], rel=1e-6)}
    assert "log_id" not in json.loads((tmp_path / "run" / "run.json").read_text())
