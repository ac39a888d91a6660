"""One journey for every task: train, stop and resume exactly, generate, evaluate, report; and options that fit none."""

import json
import tomllib

import numpy as np
import pytest
from PIL import Image

from quintic.assets import preset_names
from quintic.cli.app import main
from quintic.cli.wiring import KINDS
from quintic.engine.metrics import read_metrics

SMALL = ["--size", "tiny", "engine.steps=6", "engine.eval_every=3", "engine.checkpoint_every=3"]
IMAGES = ["data.drawn=200", "data.size=8"]


def quintic(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture(scope="module", params=list(KINDS))
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    more = [] if request.param == "lm" else IMAGES
    assert quintic("train", "--task", request.param, *SMALL, *more, "--out", folder) == 0
    return folder


def test_every_task_has_presets_and_trains(run):
    task = tomllib.loads((run / "config.toml").read_text())["task"]
    assert {"tiny", "laptop"} <= set(preset_names(task))  # the second is what train takes unasked
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7)) and all(np.isfinite(row["loss"]) for row in rows)
    assert "val_loss" in rows[2] and "val_loss" in rows[5]
    assert (run / "report.html").stat().st_size > 5000
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_every_task_resumes_bit_for_bit(run, capsys):
    assert quintic("verify-resume", run, "--steps", "4", "--cut", "2") == 0
    assert "exact: 4 steps equal 2 steps" in capsys.readouterr().out


def test_every_task_generates_and_evaluates(run, tmp_path, capsys):
    task = tomllib.loads((run / "config.toml").read_text())["task"]
    assert quintic("evaluate", run) == 0
    assert "loss" in capsys.readouterr().out
    if task == "lm":
        assert quintic("generate", run, "--max-tokens", "5") == 0
        assert quintic("generate", run, "--n", "4") == 2
        assert "--n has no meaning for a run of task lm" in capsys.readouterr().err
        return
    outs = [tmp_path / f"{i}.png" for i in range(3)]
    for seed, out in zip((0, 0, 1), outs, strict=True):
        assert quintic("generate", run, "--n", "4", "--seed", seed, "--out", out) == 0
    arrays = [np.load(out.with_suffix(".npy")) for out in outs]
    assert arrays[0].shape == (4, 8, 8, 1) and arrays[0].dtype == np.uint8
    assert np.array_equal(arrays[0], arrays[1]) and not np.array_equal(arrays[0], arrays[2])
    assert Image.open(outs[0]).size[0] >= 16
    assert quintic("generate", run, "--prompt", "x") == 2
    assert f"--prompt has no meaning for a run of task {task}" in capsys.readouterr().err
    assert quintic("generate", run, "--n", "4", "--out", tmp_path / "x.jpg") == 2
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(arrays[0][i, :, :, 0]).save(folder / f"{i}.png")
    assert quintic("evaluate", run, folder) == 0
    assert "3 images" in capsys.readouterr().out


def test_a_flow_takes_a_class_and_guidance(run, tmp_path, capsys):
    if tomllib.loads((run / "config.toml").read_text())["task"] != "tarflow":
        assert quintic("generate", run, "--guidance", "2") == 2
        assert "--guidance has no meaning" in capsys.readouterr().err
        return
    assert quintic("generate", run, "--n", "2", "--class", "3", "--guidance", "2", "--out", tmp_path / "a.png") == 0
    assert quintic("generate", run, "--n", "2", "--class", "99", "--out", tmp_path / "b.png") == 2
    assert not (tmp_path / "b.png").exists()
