"""quintic plan, as a user would type it."""

import json
import os
import re

import pytest
import torch
from tests.cli.command import quintic

from quintic.core import machine


def test_the_plan_of_a_cluster(capsys):
    words = ["plan", "--size", "moonlight-16b-a3b", "--ranks", "64", "--tokens", "5.7e12", "--peak-tflops", "989"]
    assert quintic(*words, "--memory-gib", "16") == 0
    shown = capsys.readouterr().out
    assert (
        "15.29 B" in shown and "2.24 B" in shown and "take 49 d 4 h at 40% of 989.00 TFLOP/s" in " ".join(shown.split())
    )
    assert "shorter lm.context" in shown and "micro_batch_size" not in shown
    assert quintic(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 15_960_108_544 and found["advice"] == []
    assert found["hours"] == pytest.approx(5.7e12 * found["flops_per_token"] / (64 * 989e12 * 0.4) / 3600)


def test_the_share_of_the_peak_that_a_run_reached(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("", encoding="utf-8")
    rows = [{"step": i, "mfu": share} for i, share in enumerate([0.01, 0.3, 0.2, None, 0.25], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert quintic("plan", "--size", "tiny", "--peak-tflops", "1", "--mfu-of", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mfu"] == pytest.approx(0.225)
    assert found["hours"] == pytest.approx(found["tokens"] * found["flops_per_token"] / (1e12 * 0.225) / 3600)
    (tmp_path / "metrics.jsonl").unlink()
    assert quintic("plan", "--mfu-of", str(tmp_path)) == 2
    assert "no step whose share of the peak was measured" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "does not divide among 3 ranks"),
        (["--ranks", "4", "--shards", "3"], "choose a divisor of 4"),
        (["--mfu", "0.4", "--mfu-of", "runs/a"], "either --mfu or --mfu-of"),
        (["--mfu", "40"], "--mfu must be in (0, 1]"),
        (["book.txt"], "plan takes settings only"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert quintic("plan", *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_training_that_does_not_fit_in_memory_says_so_before_its_first_step(tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text("the whale swam under the ship and the captain looked.\n" * 40)
    short = ["train", tmp_path / "book.txt", "--size", "tiny", "engine.steps=1", "lm.num_layers=2"]
    assert quintic(*short, "--out", tmp_path / "a") == 0
    assert "do not fit" not in capsys.readouterr().out
    monkeypatch.setattr(machine, "free_memory_bytes", lambda device: 6 * 2**20)
    assert quintic(*short, "--out", tmp_path / "b", "engine.batch_size=64") == 0
    told = capsys.readouterr().out
    size = int(re.search(r"do not fit in 6\.0 MiB per rank: set engine\.micro_batch_size=(\d+) or less", told)[1])
    assert 1 <= size < 64
    assert quintic(*short, "--out", tmp_path / "c", "engine.batch_size=64", f"engine.micro_batch_size={size}") == 0
    assert "do not fit" not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["ddpm", "tarflow"])
def test_so_does_one_of_images(tmp_path, monkeypatch, capsys, task):
    short = ["train", "--task", task, "--size", "tiny", "data.drawn=100", "engine.steps=1"]
    short += ["engine.batch_size=96", f"{task}.sample_images=1"]
    monkeypatch.setattr(machine, "free_memory_bytes", lambda device: 6 * 2**20)
    assert quintic(*short, "--out", tmp_path / "a") == 0
    told = " ".join(capsys.readouterr().out.split())
    size = int(re.search(r"do not fit in 6\.0 MiB per rank: set engine\.micro_batch_size=(\d+) or less", told)[1])
    assert 1 <= size < 96 and "lm." not in told
    assert quintic(*short, "--out", tmp_path / "b", f"engine.micro_batch_size={size}") == 0
    assert "do not fit" not in capsys.readouterr().out


def test_what_is_left_of_memory_is_less_than_the_machine_has():
    free = machine.free_memory_bytes(torch.device("cpu"))
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
