"""Training on 1, 2 and 4 ranks is the same training: data order, gradients, experts' balance, Muon, checkpoints.

float64, so that routing does not depend on the order of sums; every job is a torchrun as a user would start it.
"""

import json
import shutil

import pytest
import torch
from tests.distributed.processes import HERE, on_ranks

from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.metrics import read_metrics
from quintic.engine.pieces import Stored, part_files

TEXT = "the whale swam under the ship and the captain looked at the sea.\n"
SETTINGS = [
    "--size", "tiny", "engine.steps=10", "engine.eval_every=5", "engine.checkpoint_every=5", "engine.keep_last=4",
    "engine.dtype=float64", "engine.diagnose_every=0", "engine.ema_decay=0.9", "optim.lr=0.01",
    "lm.num_heads=3", "lm.qk_clip=0.1",  # two shards cut a head in the middle
]  # fmt: skip
EXACT = ("step", "tokens", "lr", "expert_load", "max_vio", "dead_experts", "qk_clipped_heads")
CLOSE = ("loss", "grad_norm", "val_loss", "clip_fraction", "max_logit")


def job(ranks, *arguments, check=True, program=("-m", "quintic")):
    """Run quintic on some ranks; (exit code, output)."""
    done = on_ranks(ranks, *program, *arguments)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{i} {TEXT}" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def alone(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    job(1, "train", book, *SETTINGS, "--out", folder)
    return folder


def newest(run):
    return list(list_checkpoints(run / "checkpoints").values())[-1]


def weights(run, name="model"):
    stored = Stored(part_files(newest(run), name))
    return {name: stored.read(name) for name in stored.shapes}


def assert_same_training(one, other):
    rows, others = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in others] == list(range(1, 11))
    for row, there in zip(rows, others, strict=True):
        assert row.keys() == there.keys()
        for name in EXACT:
            assert row.get(name) == there.get(name), (row["step"], name)
        for name in (name for name in CLOSE if name in row):
            assert row.get(name) == pytest.approx(there.get(name), rel=2e-7)  # seven digits are written
    for part in ("model", "average", "training"):
        here, there = weights(one, part), weights(other, part)
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("program", [("-m", "quintic"), (HERE / "in_blocks.py",)], ids=["whole", "in blocks"])
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ["engine.shards=2", "engine.background_save=true", "lm.checkpoint=true"]),
        (2, ["engine.shards=1", "engine.micro_batch_size=3"]),
        (
            4,
            [
                "engine.shards=2",
                "engine.micro_batch_size=3",
                "lm.checkpoint=true",
                "engine.reshard=false",
                "optim.distributed=gather",
            ],
        ),
    ],
    ids=["2 shards", "2 replicas", "2 replicas of 2 shards"],
)
def test_several_ranks_train_as_one(book, alone, tmp_path, ranks, settings, program):
    out = job(ranks, "train", book, *SETTINGS, *settings, "--out", tmp_path / "run", program=program).stdout
    assert out.count("finished 10 steps") == 1 and f"{ranks} ranks" in out
    assert_same_training(alone, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "machine.json").read_text())["ranks"] == ranks
    shards = int(settings[0].split("=")[1])  # each of which writes its own pieces
    assert {path.name for path in part_files(newest(tmp_path / "run"), "training")} == (
        {"training.safetensors"} if shards == 1 else {f"training-0000{i}-of-00002.safetensors" for i in (1, 2)}
    )
    assert (tmp_path / "run" / "report.html").exists() and len(list((tmp_path / "run" / "samples").iterdir())) == 1


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(book, alone, tmp_path, first, then):
    run = tmp_path / "run"
    job(first, "train", book, *SETTINGS, "--out", run)
    (run / "checkpoints" / "step-10").rename(tmp_path / "step-10")
    assert "continuing from step 6" in job(then, "resume", run).stdout
    assert_same_training(alone, run)


def test_float32_too(book, tmp_path):
    settings = [s for s in SETTINGS if s != "engine.dtype=float64"]
    for ranks in (1, 2):
        job(ranks, "train", book, *settings, "engine.dtype=float32", "engine.steps=5", "--out", tmp_path / str(ranks))
    one, two = (read_metrics(tmp_path / str(ranks) / "metrics.jsonl") for ranks in (1, 2))
    # Sums in another order may send a token to another expert; the loss hardly notices.
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused(book, tmp_path):
    done = job(2, "train", book, *SETTINGS, "engine.batch_size=15", "--out", tmp_path / "run", check=False)
    assert done.returncode and "15 does not divide among 2 ranks; use a multiple of 2" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_from_the_start_ends_all_of_them(book, tmp_path):
    done = on_ranks(2, HERE / "full_disk.py", book, *SETTINGS, "--out", tmp_path / "run")
    said = " ".join(done.stderr.split())
    assert done.returncode and "cli/train.py" not in said  # torchrun shows a traceback, of its own
    assert "error: initial.safetensors: No space left on device" in said
    assert "rank 0: [Errno 28] No space left on device" in said


@pytest.mark.parametrize("task", ["tarflow", "ddpm"])
def test_images_train_on_several_ranks_too(tmp_path, task):
    """Ranks draw noise of their own, so two train as well as one and not the same."""
    settings = ["--task", task, "--size", "tiny", "engine.steps=4", "engine.eval_every=2", "engine.checkpoint_every=2"]
    settings += [*(["tarflow.sample_images=2"] if task == "tarflow" else []), "engine.keep_last=4"]
    job(2, "train", *settings, "--out", tmp_path / "two")
    one, two = tmp_path / "two", tmp_path / "again"
    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoints" / "step-4")
    job(2, "resume", two)
    for part in ("model", "average", "training"):
        here, there = weights(one, part), weights(two, part)
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert len(list((one / "samples").iterdir())) == 1
    best = min(row["val_loss"] for row in read_metrics(one / "metrics.jsonl") if "val_loss" in row)
    assert f"loss {best:.5f}" in job(1, "evaluate", one, "--split", "validation").stdout  # of whole weights
