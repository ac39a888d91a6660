"""Metrics rows and run folders."""

import json
import math

import pytest

from quintic.core import CheckpointError
from quintic.engine.config import EngineConfig, Settings
from quintic.engine.metrics import MetricsFile, read_metrics
from quintic.engine.run import Run

SETTINGS = Settings(
    {"engine": EngineConfig()}, {f"engine.{name}": "default" for name in EngineConfig.__dataclass_fields__}
)


def test_rows_are_cut_back_and_gaps_are_impossible(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_through=0)
    for step in range(1, 6):
        file.append({"step": step, "loss": step / 3, "load": [0.1 + 0.2, math.nan]})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    file = MetricsFile(path, keep_through=3)
    assert file.last_step == 3
    with pytest.raises(AssertionError):
        file.append({"step": 5})
    file.append({"step": 4, "loss": 0.0})
    file.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == {"step": 1, "loss": 0.3333333, "load": [0.3, None]}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_create_open_and_refuse(tmp_path):
    folder = tmp_path / "runs" / "a"
    run = Run.create(folder, SETTINGS, {"task": "lm"})
    assert Run.open(folder).header()["task"] == "lm"
    with pytest.raises(CheckpointError, match="holds a run already; continue it with: quintic resume"):
        Run.create(folder, SETTINGS, {})
    run.record(status="running", steps=1)
    run.record(steps=2)
    assert json.loads((folder / "run.json").read_text()) == {"status": "running", "steps": 2}
    with pytest.raises(CheckpointError, match="does not exist"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        Run.open(tmp_path)
    run.config_file.write_text("[")
    with pytest.raises(CheckpointError, match="damaged"):
        run.header()


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(CheckpointError, match="not an empty folder"):
            Run.create(place, SETTINGS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_best_is_among_the_saved_and_the_newer_of_a_tie(tmp_path):
    run = Run.create(tmp_path / "r", SETTINGS, {})
    assert run.best_step() is None
    file = MetricsFile(run.metrics_file, keep_through=0)
    for step, loss in enumerate([None, 1.0, 3.0, math.nan, 2.0, 2.0], start=1):
        file.append({"step": step} | ({} if loss is None else {"val_loss": loss}))
    file.close()
    for step in (3, 4, 5, 6):
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    assert run.best_step() == 6
