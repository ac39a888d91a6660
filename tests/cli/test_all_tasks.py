"""One journey for every task: train, stop and resume exactly, generate, evaluate, report; and options that fit none."""

import json
import re
import shutil
import tomllib

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tests.cli.command import quintic

from quintic.assets import preset_names
from quintic.cli.wiring import KINDS, build_settings, build_task
from quintic.engine.metrics import read_metrics
from quintic.engine.verification import verify_resume

SMALL = ["--size", "tiny", "engine.steps=6", "engine.eval_every=3", "engine.checkpoint_every=3"]
IMAGES = ["data.drawn=200", "data.size=8"]


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


def test_roles_of_a_run(run, capsys):
    task = tomllib.loads((run / "config.toml").read_text())["task"]
    capsys.readouterr()
    assert quintic("roles", run, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    trained = load_file(run / "checkpoints" / "step-6" / "model.safetensors")
    shapes = {row["name"]: tuple(row["shape"]) for row in rows}
    assert shapes and all(tuple(trained[name].shape) == shape for name, shape in shapes.items())
    assert quintic("roles", run, "--task", task) == 2
    assert "give one run folder" in capsys.readouterr().err


def test_every_task_resumes_bit_for_bit(run, capsys):
    assert quintic("verify-resume", run, "--steps", "4", "--cut", "2") == 0
    assert "exact: 4 steps equal 2 steps" in capsys.readouterr().out


MUCH = ["engine.ema_decay=0.9", "engine.micro_batch_size=5", "optim.decay=spectral", "optim.clip=adaptive"]
OF_TEXT = {
    "spectral decay, QK-clip, all losses": [*MUCH, "lm.aux_weight=0.01", "lm.z_weight=0.001", "lm.qk_clip=1"],
    "bias by quantiles, blocks again": [
        "lm.balance_rule=quantile",
        "lm.checkpoint=true",
        "engine.background_save=true",
    ],
    "a loss over everything": ["lm.balance=none", "lm.aux_weight=0.01", "lm.aux_over=global", *MUCH[:2]],
    "no Adam": ["optim.vectors=sign", "optim.embeddings=row-l2", "optim.cap=0.5", "lm.balance_rule=sign"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "settings"),
    [*((task, [*MUCH, *IMAGES]) for task in KINDS if task != "lm"), *(("lm", more) for more in OF_TEXT.values())],
    ids=[*(task for task in KINDS if task != "lm"), *OF_TEXT],
)
def test_every_state_of_every_task_resumes_bit_for_bit(tmp_path, task, settings, dtype):
    """Averages, spectral vectors, memory of the clipping, balancers, accumulation, in both precisions."""
    book = tmp_path / "book.txt"
    book.write_text("the whale swam under the ship and the captain looked at the sea.\n" * 100)
    paths = [book] if task == "lm" else []
    made, resolved, _ = build_task(task, paths, build_settings(task, "tiny", [*settings, f"engine.dtype={dtype}"]))
    result = verify_resume(made, resolved, tmp_path, steps=4, cut=2)
    assert result.differences == []
    parts = {path.name.split(".")[0] for path in (tmp_path / "parted" / "checkpoints" / "step-4").iterdir()}
    assert ("average" in parts) == ("engine.ema_decay=0.9" in settings) and {"model", "training"} <= parts
    if "optim.decay=spectral" in settings:
        names = load_file(tmp_path / "parted" / "checkpoints" / "step-4" / "training.safetensors")
        assert any("top_space" in name for name in names)


@pytest.mark.parametrize("task", list(KINDS))
def test_a_stop_is_seen_in_the_middle_of_a_sample(tmp_path, task):
    made, _, _ = build_task(task, [], build_settings(task, "tiny", [] if task == "lm" else IMAGES))
    asked = []
    made.sample(made.build(0).eval(), tmp_path / "sample", 0, lambda: asked.append(1) or len(asked) > 2)
    assert len(asked) == 3
    assert not (tmp_path / "sample.png").exists()


def test_every_task_generates_and_evaluates(run, tmp_path, capsys):
    task = tomllib.loads((run / "config.toml").read_text())["task"]
    assert quintic("evaluate", run) == 0
    unit = {"lm": "nats a token", "tarflow": "(nats per pixel value)", "ddpm": "(mean squared error)"}[task]
    assert re.search(rf"loss [\d.]+ {re.escape(unit)}", capsys.readouterr().out)
    if task == "lm":
        assert quintic("generate", run, "--max-tokens", "5") == 0
        assert quintic("generate", run, "--steps", "4") == 2
        assert "--steps has no meaning for a run of task lm" in capsys.readouterr().err
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
    told = capsys.readouterr().out
    assert "3 images" in told
    assert task == "ddpm" or all(told.count(str(folder / f"{i}.png")) == 1 for i in range(3))
    # Whatever size and colours pictures have, the model gets them as it takes them.
    Image.fromarray(arrays[0][0, :, :, 0]).convert("RGB").resize((12, 10)).save(folder / "3.png")
    assert quintic("evaluate", run, folder) == 0
    assert "4 images" in capsys.readouterr().out
    if task == "tarflow":  # in no folders of classes they have none, unless one is named
        found = []
        for options in ((), ("--class", "-1"), ("--class", "3")):
            capsys.readouterr()
            assert quintic("evaluate", run, folder, "--json", *options) == 0
            found.append(json.loads(capsys.readouterr().out)["bits_per_dim_of_each"])
        assert found[0] == found[1] and not np.allclose(found[0], found[2], rtol=1e-7)
    if task == "tarflow":  # of many the strangest are listed, in order
        for i in range(4, 60):
            Image.fromarray(arrays[0][i % 3, :, :, 0]).save(folder / f"{i}.png")
        assert quintic("evaluate", run, folder) == 0
        lines = capsys.readouterr().out.splitlines()
        scores = [float(line.split()[1]) for line in lines if line.endswith(".png")]
        assert len(scores) == 40 and scores == sorted(scores, reverse=True)
        assert "the 40 strangest" in lines[1] and lines[-1].startswith("60 images")


def test_a_flow_takes_a_class_and_guidance(run, tmp_path, capsys):
    if tomllib.loads((run / "config.toml").read_text())["task"] != "tarflow":
        assert quintic("generate", run, "--guidance", "2") == 2
        task = tomllib.loads((run / "config.toml").read_text())["task"]
        said = "has no meaning for a run of task lm" if task == "lm" else "needs a model with classes"
        assert f"--guidance {said}" in capsys.readouterr().err
        assert task != "lm" or quintic("evaluate", run, "--class", "x") == 2
        return
    assert quintic("generate", run, "--n", "2", "--class", "3", "--guidance", "2", "--out", tmp_path / "a.png") == 0
    assert quintic("generate", run, "--n", "2", "--class", "99", "--out", tmp_path / "b.png") == 2
    assert not (tmp_path / "b.png").exists()
    names = json.loads((run / "run.json").read_text())["data"]["classes"]
    made = [tmp_path / "by-number.npz", tmp_path / "by-name.npz"]
    for file, given in zip(made, ("3", names[3]), strict=True):
        assert quintic("generate", run, "--n", "2", "--class", given, "--out", file.with_suffix(".png")) == 0
    first, second = (np.load(file.with_suffix(".npy")) for file in made)
    assert (first == second).all()
    capsys.readouterr()
    other = shutil.copytree(run, tmp_path / "always-told")
    text = (other / "config.toml").read_text()
    assert "class_dropout = 0.1" in text
    (other / "config.toml").write_text(text.replace("class_dropout = 0.1", "class_dropout = 0.0"))
    assert quintic("generate", other, "--class", "3", "--guidance", "2") == 2
    assert "seen images without their class, found tarflow.class_dropout=0" in " ".join(capsys.readouterr().err.split())
    assert quintic("generate", run, "--class", f"{names[3]}s") == 2
    assert f"did you mean '{names[3]}'?" in capsys.readouterr().err
