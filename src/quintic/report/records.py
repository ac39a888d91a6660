"""What a run folder knows about its run, read once, as arrays and plain dictionaries."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quintic.core import CheckpointError, DataError
from quintic.engine.metrics import read_metrics
from quintic.engine.run import Run

__all__ = ["Bits", "Floats", "Records", "json_object", "loss_unit", "numbers", "read_records"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bits:
    """A view of the loss that compares across models: bits per unit of the raw data."""

    key: str
    """In the metrics; that of the validation has ``val_`` before it."""
    unit: str
    data: str
    """What is measured on."""
    raw: str
    """What the data takes as it is."""


_BITS = (
    Bits("bits_per_byte", "bits per byte", "text", "raw text takes 8"),
    Bits("bits_per_dim", "bits per dimension", "images", "raw pixels take 8"),
)
_LOSS_UNITS = {"lm": "nats per token", "tarflow": "nats per pixel value", "ddpm": "mean squared error"}


def loss_unit(task: str) -> str:
    """What a task's loss is counted in; empty for one that is not known."""
    return _LOSS_UNITS.get(task, "")


@dataclass(frozen=True)
class Records:
    """The records of one run."""

    folder: Path
    """The run folder."""
    rows: list[dict[str, Any]]
    """Metrics, one per optimizer step, at least one."""
    config: dict[str, Any]
    """``config.toml``, parsed."""
    config_text: str
    """``config.toml`` as written, with the source of each value as a comment."""
    run: dict[str, Any]
    """``run.json``; empty if absent."""
    machine: dict[str, Any]
    """``machine.json``; empty if absent."""
    samples: list[tuple[int, Path]]
    """(step, file) of every sample, text or PNG, by step."""

    def column(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of the rows that have a key; what is not a finite number is NaN."""
        found = [(row["step"], _number(row[key])) for row in self.rows if key in row]
        steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    def layers(self, key: str) -> list[tuple[Floats, Floats]]:
        """Like :meth:`column` for a key that holds one number per MoE layer: one pair per layer."""
        rows = [row for row in self.rows if row.get(key) and isinstance(row[key], list)]
        count = max((len(row[key]) for row in rows), default=0)
        pairs = []
        for layer in range(count):
            found = [(row["step"], _number(row[key][layer])) for row in rows if layer < len(row[key])]
            steps, values = np.array(found, dtype=np.float64).T
            pairs.append((steps, values))
        return pairs

    def last(self, key: str) -> float | None:
        """The newest finite value of a key."""
        _, values = self.column(key)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def median(self, key: str) -> float | None:
        """The median of the finite values of a key: a typical step, whatever else the machine did meanwhile."""
        _, values = self.column(key)
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None

    def best(self, key: str) -> tuple[int, float] | None:
        """Step and value where a key was lowest."""
        steps, values = self.column(key)
        if not np.isfinite(values).any():
            return None
        at = int(np.nanargmin(values))
        return int(steps[at]), float(values[at])

    @property
    def things(self) -> str:
        """What the loss is counted over: tokens of text, values of pixels."""
        return "tokens" if self.run.get("task", "lm") == "lm" else "pixel values"

    @property
    def bits(self) -> Bits | None:
        """The bits that the metrics hold, if any."""
        return next((bits for bits in _BITS if any(bits.key in row for row in self.rows)), None)

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in; empty where that is not known."""
        return loss_unit(str(self.run.get("task", "lm")))

    @property
    def step(self) -> int:
        """The last step taken."""
        return int(self.rows[-1]["step"])


def read_records(folder: Path) -> Records:
    """Read a run folder. The run may still be training.

    Args:
        folder: The run folder.

    Raises:
        CheckpointError: The folder holds no run, or one of its records is damaged.
        DataError: No step has been recorded yet.
    """
    run = Run.open(folder)
    config = run.header()
    for section in ("engine", "optim"):
        if not isinstance(config.get(section, {}), dict):
            raise CheckpointError(f"{run.config_file} is damaged: {section!r} is {config[section]!r}, no section")
    rows = read_metrics(run.metrics_file)
    if not rows:
        if (made := config.get("size")) in ("imported", "compressed"):
            raise DataError(f"{folder} was {made}, not trained, so there is nothing to report")
        raise DataError(
            f"{folder} has no metrics yet (metrics.jsonl is absent or empty), so there is nothing to report; "
            f"let it take a step, or continue it with: quintic resume {folder}"
        )
    return Records(
        folder=folder,
        rows=rows,
        config=config,
        config_text=run.config_file.read_text(encoding="utf-8"),
        run=json_object(folder / "run.json"),
        machine=json_object(folder / "machine.json"),
        samples=_samples(run),
    )


def _samples(run: Run) -> list[tuple[int, Path]]:
    """Files by step. None that leads out of the run folder: a page is passed on, with what it shows."""
    names, inside = re.compile(r"step-(\d+)\.(txt|png)"), os.path.realpath(run.folder)
    found = [(int(match[1]), path) for path in run.samples.glob("*") if (match := names.fullmatch(path.name))]
    return sorted(
        (step, path) for step, path in found if path.is_file() and Path(os.path.realpath(path)).is_relative_to(inside)
    )


def json_object(path: Path, remedy: str = "the report can do without it: delete it and repeat") -> dict[str, Any]:
    """A file of one JSON object; empty if there is no such file.

    Args:
        path: The file.
        remedy: What a person can do about a damaged one.

    Raises:
        CheckpointError: It holds something else.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a JSON object was expected; {remedy}")
    return value


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def numbers(value: Any, axes: int) -> Floats | None:
    """Numbers of a record in nested lists of so many axes, null being NaN; None of anything else."""
    try:
        found = np.array(value)
        found = found.astype(np.float64) if found.dtype.kind in "biufO" else None
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found is not None and found.ndim == axes else None
