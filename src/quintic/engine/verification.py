"""Proof on a user's own run that a stop and a resume change nothing: N steps against k steps, a stop, and the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from quintic.core import ConfigError
from quintic.engine.checkpoint import files_of, list_checkpoints
from quintic.engine.config import Settings
from quintic.engine.loop import train
from quintic.engine.metrics import read_metrics
from quintic.engine.pieces import Stored
from quintic.engine.run import Run
from quintic.engine.task import Task

__all__ = ["Verification", "differences", "verify_resume"]

TIMINGS = ("seconds", "tokens_per_second", "optimizer_share", "mfu")
"""Metrics that measure time and so differ from run to run."""


@dataclass(frozen=True)
class Verification:
    """What was compared and what differs."""

    steps: int
    """Steps of the uncut run."""
    cut: int
    """Step after which the other run was stopped and resumed."""
    tensors: int
    """Tensors compared: weights, buffers, averages, optimizer state, random generators."""
    differences: list[str]
    """Names of what is not bit for bit equal; empty if the resume is exact."""


def verify_resume(
    task: Task, settings: Settings, folder: Path, *, steps: int = 6, cut: int | None = None, initial: Path | None = None
) -> Verification:
    """Train twice from the start, once with a stop and a resume in between, and compare every bit.

    Args:
        task: What a run trains.
        settings: The run's own; steps of the schedule are kept, so the learning rates are those of the run.
        folder: An empty folder for the two short runs.
        steps: How many steps to train.
        cut: After which step to stop and resume; None is half way.
        initial: Weights to start from, :attr:`quintic.engine.run.Run.initial`; None starts from the seed's.

    Raises:
        ConfigError: There is one step only, or ``cut`` does not lie inside the steps.
    """
    steps = min(steps, settings["engine"].steps)
    if steps < 2:
        raise ConfigError(f"a stop and a resume need at least 2 steps, found {steps}")
    cut = steps // 2 if cut is None else cut
    if not 0 < cut < steps:
        raise ConfigError(f"the cut must lie between step 1 and {steps - 1} of {steps} steps, found {cut}")
    for name, value in (("eval_every", cut), ("sample_every", 0), ("checkpoint_every", 0), ("diagnose_every", 2)):
        settings = settings.derive(f"engine.{name}", value, "verification")
    start = None if initial is None else load_file(initial)
    whole, parted = (Run.create(folder / name, settings, {"task": task.name}, start) for name in ("whole", "parted"))
    quiet = Console(quiet=True)
    for run, until in ((whole, steps), (parted, cut), (parted, steps)):
        if train(task, settings, run, quiet, quiet_peak=True, stop_at=until).step < until:
            raise KeyboardInterrupt  # told to stop: that is no difference
    return Verification(steps, cut, *differences(whole, parted))


def differences(first: Run, second: Run) -> tuple[int, list[str]]:
    """Compare the newest checkpoints and all metrics of two runs.

    Returns:
        How many tensors were compared, and the names of what differs.
    """
    one, two = (list(list_checkpoints(run.checkpoints).values())[-1] for run in (first, second))
    wrong, count = [], 0
    for part in ("average", "model", "training"):
        left, right = (Stored(files_of(path, part)) for path in (one, two))
        count += len(left.shapes)
        for name in sorted(left.shapes.keys() | right.shapes.keys()):
            missing = name not in left.shapes or name not in right.shapes
            if missing or not _same_bits(left.read(name), right.read(name)):
                wrong.append(f"{part}: {name}")
    states = [json.loads((path / "state.json").read_text(encoding="utf-8")) for path in (one, two)]
    for state in states:
        state.pop("seconds")
        state.pop("row")  # among the metrics
    wrong += [f"state: {name}" for name in states[0] if states[0][name] != states[1].get(name)]
    rows = [[_untimed(row) for row in read_metrics(run.metrics_file)] for run in (first, second)]
    if len(rows[0]) != len(rows[1]):
        wrong.append(f"metrics: {len(rows[0])} rows against {len(rows[1])}")
    wrong += [f"metrics: step {a['step']}" for a, b in zip(*rows, strict=False) if a != b]
    return count, wrong


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, which tells NaNs and signed zeros too."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8))


def _untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMINGS}
