"""A user's journey: train, look, stop, resume, generate, evaluate; all on the tiny preset."""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.cli.command import quintic

from quintic.cli.train import run_training
from quintic.cli.wiring import build_settings, build_task
from quintic.core.ranks import ALONE
from quintic.engine import Run
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.loop import Outcome
from quintic.engine.metrics import read_metrics

SMALL = [
    "--size",
    "tiny",
    "engine.steps=14",
    "engine.checkpoint_every=7",
    "engine.eval_every=7",
    "engine.sample_every=7",
]
TIMINGS = ("seconds", "tokens_per_second", "optimizer_share", "mfu")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    words = ["the", "whale", "swam", "under", "the", "ship", "and", "the", "captain", "looked", "at", "the", "sea"]
    lines = [" ".join(words[(i * j) % 13] for j in range(1, 9)) + f" {i}." for i in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert quintic("train", book, *SMALL, "--out", folder) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_the_run_folder_holds_what_it_should(run):
    files = {"config.toml", "run.json", "machine.json", "metrics.jsonl", "tokenizer.json", "report.html"}
    assert {path.name for path in run.iterdir()} == files | {"checkpoints", "samples", ".lock"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 15))
    wanted = {"step", "loss", "bits_per_byte", "lr", "grad_norm", "clip_fraction", "tokens_per_second", "tokens",
              "seconds", "optimizer_share", "mfu", "max_vio", "max_vio_floor", "dead_experts"}  # fmt: skip
    assert all(wanted <= row.keys() for row in rows)
    assert all(0 < row["optimizer_share"] < 1 and row["mfu"] > 0 for row in rows)
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [7, 14]
    assert [row["step"] for row in rows if "expert_load" in row] == [1, 10]
    for layer in rows[0]["expert_load"]:
        assert len(layer) == 8 and sum(layer) == pytest.approx(1, abs=1e-5)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000007.txt", "step-000014.txt"]
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "finished" and facts["parameters_active"] < facts["parameters_total"]
    assert json.loads((run / "machine.json").read_text())["peak_memory_mb"] > 50


def test_bits_per_byte_is_nats_over_the_bytes_of_the_text(run):
    last = read_metrics(run / "metrics.jsonl")[-1]
    data = json.loads((run / "run.json").read_text())["data"]["validation"]
    nats = last["val_loss"] * (data["tokens"] - 1)
    assert last["val_bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / data["bytes"], rel=1e-5)


def test_the_configuration_names_its_sources(run, book):
    text = (run / "config.toml").read_text()
    config = tomllib.loads(text)
    assert config["paths"] == [str(book)] and config["task"] == "lm" and config["size"] == "tiny"
    assert re.search(r"^steps = 14  # given$", text, re.M)
    assert re.search(r"^d_model = 64  # preset tiny$", text, re.M)
    assert re.search(r"^vocab_size = 264  # tokenizer has 257 tokens, rounded up", text, re.M)
    assert re.search(r"^route_scale = 1\.\d+  # equal RMS", text, re.M)
    assert re.search(r"^dtype = \"float32\"  # fastest", text, re.M) or config["engine"]["dtype"] == "bfloat16"


def test_several_texts_are_those_of_seeds_that_follow_each_other(run, capsys):
    texts = []
    for seed in (5, 6):
        assert quintic("generate", run, "--prompt", "the", "--max-tokens", 10, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert quintic("generate", run, "--prompt", "the", "--max-tokens", 10, "--seed", 5, "--n", 2) == 0
    assert capsys.readouterr().out == f"--- seed 5\n{texts[0]}--- seed 6\n{texts[1]}"
    assert quintic("generate", run, "--n", 0) == 2
    assert "--n must be at least 1" in capsys.readouterr().err


def test_generate_is_seeded_and_streams_the_prompt_first(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert (
            quintic("generate", run, "--prompt", "the whale", "--max-tokens", 30, "--seed", seed, "--temperature", 1.0)
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the whale") and len(text) > 10 for text in texts)


def test_evaluate_on_its_splits_and_on_other_text(run, book, tmp_path, capsys):
    assert quintic("evaluate", run, "--split", "validation", "--checkpoint", "last") == 0
    shown = float(re.search(r"loss ([\d.]+) nats", capsys.readouterr().out)[1])
    assert shown == pytest.approx(read_metrics(run / "metrics.jsonl")[-1]["val_loss"], abs=1e-4)
    assert quintic("evaluate", run) == 0
    assert "test split" in capsys.readouterr().out
    losses = []
    for dtype in ("float64", "float32", "bfloat16"):
        assert quintic("evaluate", run, "--split", "validation", "--checkpoint", "last", "--dtype", dtype) == 0
        losses.append(float(re.search(r"loss ([\d.]+) nats", capsys.readouterr().out)[1]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=0.05)
    (tmp_path / "other.md").write_text("the captain looked at the whale")
    assert quintic("evaluate", run, tmp_path) == 0
    plain = capsys.readouterr().out
    assert "bits per byte" in plain
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"body": "the captain looked at the whale"}), encoding="utf-16")
    assert quintic("evaluate", run, other) == 2
    assert "choose one with data.field=body" in capsys.readouterr().err
    assert quintic("evaluate", run, other, "data.field=body", "data.encoding=utf-16") == 0
    assert capsys.readouterr().out.split(": loss")[1] == plain.split(": loss")[1]


def test_report_can_be_made_again(copy, capsys):
    (copy / "report.html").unlink()
    assert quintic("report", copy) == 0
    assert str(copy / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert "<svg" in (copy / "report.html").read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_sample_of_a_training_and_does_not_obey_it(book, tmp_path, monkeypatch, terminal):
    ended = Outcome(True, 1, 0, {"loss": 1.0}, "\x1b[31mred", None)
    monkeypatch.setattr("quintic.engine.loop.train", lambda *_, **__: ended)
    screen = io.StringIO()
    task, settings, _ = build_task("lm", [book], build_settings("lm", "tiny", []))
    run_training(Console(file=screen, force_terminal=terminal), task, settings, Run(tmp_path), ALONE)
    assert ("sample:\n␛[31mred\n" if terminal else "sample:\n\x1b[31mred\n") in screen.getvalue()


def test_a_run_is_trained_longer(copy, tmp_path, capsys):
    before = (copy / "config.toml").read_bytes()
    assert quintic("resume", copy, "--steps", 16) == 0
    told = capsys.readouterr().out
    assert "going on from step 8" in told and f"run folder: {copy}-16" in told and "finished 16 steps" in told
    assert [row["step"] for row in read_metrics(tmp_path / "copy-16" / "metrics.jsonl")] == list(range(1, 17))
    assert (copy / "config.toml").read_bytes() == before
    assert quintic("resume", copy, "--steps", 16) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert quintic("resume", copy, "--steps", 3) == 2
    assert "14 steps already: --steps, the number of all steps, must be more" in capsys.readouterr().err
    assert quintic("resume", copy, "--out", tmp_path / "other") == 2
    assert "give --steps too" in capsys.readouterr().err


def test_resume_of_a_finished_run_says_so(copy, capsys):
    before = (copy / "metrics.jsonl").read_bytes()
    assert quintic("resume", copy) == 0
    assert "finished" in capsys.readouterr().out
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("shards", [0, 2])
def test_resume_from_the_middle_is_bit_exact(copy, run, capsys, shards):
    """Also here of a run that several ranks began, in groups that one rank cannot form."""
    shutil.rmtree(copy / "checkpoints" / "step-14")
    settings = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(settings.replace("\nshards = 0 ", f"\nshards = {shards} "))
    assert quintic("resume", copy) == 0
    assert ("engine.shards was 2, which does not divide 1 rank: now" in capsys.readouterr().out) == (shards == 2)
    same_run(copy, run)


def test_resume_without_its_checkpoints_keeps_the_metrics_and_without_those_starts_at_zero(copy, run, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes()
    assert quintic("resume", copy) == 2
    assert "reach step 14, but there is no checkpoint to go on from" in " ".join(capsys.readouterr().err.split())
    assert (copy / "metrics.jsonl").read_bytes() == before
    (copy / "metrics.jsonl").unlink()
    assert quintic("resume", copy) == 0
    same_run(copy, run)


def same_run(a, b):
    assert list_checkpoints(a / "checkpoints").keys() == list_checkpoints(b / "checkpoints").keys()
    for name in ("model", "training"):
        left, right = (load_file(r / "checkpoints" / "step-14" / f"{name}.safetensors") for r in (a, b))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    rows = [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(r / "metrics.jsonl")]
        for r in (a, b)
    ]
    assert rows[0] == rows[1]
    assert (a / "samples" / "step-000014.txt").read_text() == (b / "samples" / "step-000014.txt").read_text()


def wait_for_rows(folder, number, process):
    deadline = time.monotonic() + 90
    while len(read_metrics(folder / "metrics.jsonl")) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGKILL", None)])
def test_stopped_from_outside_and_resumed(book, tmp_path, how):
    """A real process, stopped politely or killed, resumes to the same weights as one that ran through."""
    if how is None:
        pytest.skip("no SIGKILL here")
    settings = ["--size", "tiny", "engine.steps=150", "engine.checkpoint_every=40", "engine.eval_every=50"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert quintic("train", book, *settings, "--out", whole) == 0
    command = [sys.executable, "-m", "quintic", "train", str(book), *settings, "--out", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_rows(stopped, 60, process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    steps = list(list_checkpoints(stopped / "checkpoints"))
    if how == getattr(signal, "SIGKILL", None):
        assert process.returncode == -how and steps == [40, 50]  # the second as the best so far
    else:
        assert process.returncode == 0 and f"quintic resume {stopped}" in output and 60 <= steps[-1] < 150
    assert quintic("resume", stopped) == 0
    left, right = (load_file(r / "checkpoints" / "step-150" / "training.safetensors") for r in (whole, stopped))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert [row["step"] for row in read_metrics(stopped / "metrics.jsonl")] == list(range(1, 151))
    losses = [[row["loss"] for row in read_metrics(r / "metrics.jsonl")] for r in (whole, stopped)]
    assert losses[0] == losses[1]


def test_stopped_before_the_first_step(book, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def at_once(_):
        yield lambda: True

    with monkeypatch.context() as patch:
        patch.setattr("quintic.engine.loop.stop_requests", at_once)
        assert quintic("train", book, *SMALL, "--out", tmp_path / "run") == 0
    assert "stopped at step 0; continue with: quintic resume" in capsys.readouterr().out
    assert quintic("resume", tmp_path / "run") == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 14


def test_no_validation_split_is_no_validation(book, tmp_path, capsys):
    out = tmp_path / "run"
    assert quintic("train", book, *SMALL, "data.validation_fraction=0", "--out", out) == 0
    assert "training loss" in capsys.readouterr().out
    assert not any("val_loss" in row for row in read_metrics(out / "metrics.jsonl"))


def test_a_tokenizer_of_ones_own_is_found_from_any_folder(book, tmp_path, monkeypatch):
    from quintic.data import Tokenizer

    Tokenizer.train([book.read_text()], 300).save(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    assert quintic("train", book, *SMALL, "data.tokenizer=mine.json", "--out", "run") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-14")
    monkeypatch.chdir("/")
    assert quintic("resume", tmp_path / "run") == 0
    assert (tmp_path / "run" / "checkpoints" / "step-14").is_dir()


def test_adamw_dense_and_documents_train_too(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(30):
        (notes / f"{i}.txt").write_text("a short note about the sea " * 3)
    out = tmp_path / "run"
    assert quintic(
        "train", notes, "--size", "tiny", "--out", out, "engine.steps=12", "optim.name=adamw", "optim.lr=0.003",
        "lm.num_dense_layers=3", "data.cross_documents=false", "optim.schedule=cosine", "--seed", 3,
    ) == 0  # fmt: skip
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3 and "max_vio" not in rows[0]
    assert tomllib.loads((out / "config.toml").read_text())["engine"]["seed"] == 3


def test_float64_and_bfloat16_train(book, tmp_path):
    final = {}
    for dtype in ("float64", "float32", "bfloat16"):
        out = tmp_path / dtype
        assert quintic("train", book, "--size", "tiny", "--out", out, "engine.steps=5", "--dtype", dtype) == 0
        final[dtype] = read_metrics(out / "metrics.jsonl")[-1]["loss"]
        weights = load_file(out / "checkpoints" / "step-5" / "model.safetensors")
        assert weights["head.weight"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert final["float32"] == pytest.approx(final["float64"], abs=1e-3)
    assert final["bfloat16"] == pytest.approx(final["float64"], abs=0.05)


def test_steps_follow_the_corpus_where_epochs_bound_them(book, tmp_path):
    out = tmp_path / "r"
    assert quintic("train", book, "--size", "tiny", "--out", out, "engine.max_epochs=0.25") == 0
    config = (out / "config.toml").read_text()
    assert re.search(r"^steps = \d  # 0.25 epochs of \d+ windows, 16 a step$", config, re.M)


def test_steps_of_0_are_as_many_as_the_epochs_allow(book, tmp_path, capsys):
    """Also where the epochs are those of the preset; a run that an earlier version began so is trained by resume."""
    settings = build_settings("lm", "laptop", ["engine.steps=0"])
    _, resolved, _ = build_task("lm", [book], settings)
    assert resolved["engine"].steps > 1 and "30 epochs" in resolved.sources["engine.steps"]
    out = tmp_path / "r"
    few = ["lm.num_layers=1", "engine.max_epochs=0.01", "engine.steps=0"]
    assert quintic("train", book, "--size", "tiny", *few, "--out", out) == 0
    assert "finished 1 step:" in capsys.readouterr().out
    for path in (out / "checkpoints", out / "metrics.jsonl"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(re.sub(r"^steps = 1 .*$", "steps = 0", config, flags=re.M))
    assert quintic("resume", out) == 0 and "finished 1 step:" in capsys.readouterr().out


def test_runs_without_out_get_names_of_their_own(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert quintic("train", book, "--size", "tiny", "engine.steps=1") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["book-tiny", "book-tiny-2"]


def test_roles_doctor_and_settings(capsys):
    assert quintic("roles", "--size", "tiny") == 0
    out = capsys.readouterr().out
    assert re.search(r"blocks\.1\.ffn\.experts\.gate_up .*expert stack .*muon", out)
    assert re.search(r"embedding\.weight .*adamw", out)
    assert quintic("doctor") == 0
    assert "GFLOP/s" in capsys.readouterr().out
    assert quintic("train", "--size", "tiny", "--settings") == 0
    out = capsys.readouterr().out
    for name in ("lm.num_experts", "data.encoding", "optim.lr", "engine.checkpoint_every"):
        assert name in out


def test_a_text_of_fewer_windows_than_a_step_takes_is_told(tmp_path, capsys):
    path = tmp_path / "note.txt"
    path.write_text("The whale swam under the ship. " * 20)
    short = ["engine.steps=1", "lm.num_layers=1"]
    assert quintic("train", path, "--size", "tiny", *short, "--out", tmp_path / "a") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "the text to train on is 9 windows of lm.context = 64 tokens, and a step takes engine.batch_size = 16" in shown
    )
    assert quintic("train", path, "--size", "tiny", *short, "engine.batch_size=9", "--out", tmp_path / "b") == 0
    assert "windows of lm.context" not in capsys.readouterr().out
