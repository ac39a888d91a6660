"""One step: the rates of groups follow the schedule, each from its own base, resumed or not."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.engine.toy import TYPES, ToyTask, toy_run

from quintic.engine import Settings, loop
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.metrics import read_metrics
from quintic.engine.run import Run
from quintic.optim import lr_factor

OWN = ("optim.scale=keller", "optim.adamw_lr=0.002", "optim.adamw_weight_decay=0", "optim.weight_decay=0.5")


def go(run, settings, stop_at=None):
    loop.train(ToyTask(), settings, run, Console(file=io.StringIO()), quiet_peak=True, stop_at=stop_at)
    return load_file(list(list_checkpoints(run.checkpoints).values())[-1] / "model.safetensors")


def test_the_schedule_multiplies_the_rates_of_both_halves(tmp_path):
    """AdamW's first step moves every element by its rate, so that the rate can be read off the weights."""
    initial = ToyTask().build(0)
    for factor, warmup in ((1.0, 0.0), (1 / 7, 0.5)):
        settings, run = toy_run(tmp_path / str(warmup), *OWN, f"optim.warmup_fraction={warmup}")
        after = go(run, settings, stop_at=1)
        moved = (after["head"] - initial.head.detach()).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.002 * factor), rtol=1e-4, atol=1e-8)
        # Keller's factor of the wide (4, 6) is 1: all singular values of the step are the rate, but for the decay.
        step = initial.weight.detach() * (1 - 0.05 * factor * 0.5) - after["weight"]
        assert torch.linalg.svdvals(step) == pytest.approx([0.05 * factor] * 4, rel=0.2)
        (row,) = read_metrics(run.metrics_file)
        assert (row["lr"], row["adamw_lr"]) == pytest.approx((0.05 * factor, 0.002 * factor))


def test_rates_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    whole = go(*reversed(toy_run(tmp_path / "whole", *OWN)))
    settings, run = toy_run(tmp_path / "parts", *OWN)
    go(run, settings, stop_at=4)
    again = go(Run.open(run.folder), Settings.from_toml((run.folder / "config.toml").read_text(), TYPES))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    rates = [row["adamw_lr"] for row in read_metrics(run.metrics_file)]
    assert rates == pytest.approx([0.002 * lr_factor(step, 12, settings["optim"]) for step in range(12)])


def test_a_run_of_before_there_were_two_rates_resumes(tmp_path):
    """Its settings say nothing of them."""
    settings, run = toy_run(tmp_path / "whole")
    whole = go(run, settings)
    settings, run = toy_run(tmp_path / "old")
    go(run, settings, stop_at=5)
    lines = (run.folder / "config.toml").read_text().splitlines()
    old = "\n".join(line for line in lines if not line.startswith(("adamw_lr", "adamw_weight_decay")))
    assert len(old.splitlines()) == len(lines) - 2
    resumed = go(run, Settings.from_toml(old, TYPES))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert all("adamw_lr" not in row for row in read_metrics(run.metrics_file))
