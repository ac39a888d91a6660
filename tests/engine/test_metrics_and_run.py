"""Metrics rows and run folders."""

import json
import math

import pytest

from quintic.core import CheckpointError
from quintic.core.ranks import Ranks
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


@pytest.mark.parametrize(
    ("damage", "left", "words"),
    [
        (lambda lines: [], [], ["steps 1 to 5"]),
        (lambda lines: lines[:2], [1, 2], ["steps 3 to 5"]),
        (lambda lines: [*lines[:1], b"\n", b"\xff\xfe{}\n", b"[3]\n", b'{"loss": 1}\n', *lines[3:]], [1, 4, 5], []),
        (lambda lines: [*lines, b"\0" * 9, b"\xff"], [1, 2, 3, 4, 5], []),
        (lambda lines: [*lines, b"[" * 200_000, b"\n", b'{"step": %s}\n' % (b"9" * 5000)], [1, 2, 3, 4, 5], []),
        (lambda lines: [*lines, b'{"step": %s}\n' % (b"9" * 400), b'{"step": true}\n'], [1, 2, 3, 4, 5], []),
    ],
)
def test_rows_that_the_disk_has_lost_are_told_of_and_stop_nothing(tmp_path, damage, left, words):
    path, told = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"".join(damage([b'{"step": %d}\n' % step for step in range(1, 6)])))
    assert [row["step"] for row in read_metrics(path)] == left
    file = MetricsFile(path, keep_through=6, warn=told.append)  # the checkpoint has the row of its own step
    assert file.last_step == 5
    file.append({"step": 6})
    file.close()
    assert [row["step"] for row in read_metrics(path)] == [*left, 6]
    assert [word in text for word, text in zip(words, told, strict=True)] == [True] * len(words)


def test_ranks_follow_what_the_first_has_read(tmp_path):
    """A shared disk may show another machine an older file."""

    class Other(Ranks):
        is_main = False

        def gather(self, mine):
            return [({"step": 5, "loss": 0.5}, 2.0), mine]

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n')
    file = MetricsFile(path, keep_through=5, ranks=Other())
    assert (file.last_step, file.last_row) == (5, {"step": 5, "loss": 0.5})
    assert [file.improves({"step": 6, "val_loss": loss}) for loss in (1.5, 2.0)] == [True, False]
    file.append({"step": 6})
    assert path.read_text() == '{"step": 4}\n'


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
    for damaged in ("[", "a = " + "[" * 200_000):
        run.config_file.write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            run.header()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"3", b"[" * 200_000])
def test_damaged_facts_are_named(tmp_path, content):
    run = Run.create(tmp_path / "a", SETTINGS, {"task": "lm"})
    (run.folder / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged .*delete it"):
        run.record(status="running")


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
    with run.metrics_file.open("a") as damaged:
        for loss in ('"abc"', "9" * 400, "[0.5]", "null"):
            damaged.write(f'{{"step": 3, "val_loss": {loss}}}\n')
    assert run.best_step() == 6
