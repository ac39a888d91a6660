"""``quintic evaluate``: loss and bits per byte on text that was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say

__all__ = ["evaluate"]


def evaluate(
    run: Path,
    /,
    *data: Path,
    split: str = "test",
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Evaluate a run on its own held-out test split, or on other text.

    Parameters
    ----------
    run
        The run folder; or a model that comes with the package, by its name: ddpm/fashion28, ddpm/emoji32,
        tarflow/fashion28.
    data
        Files and folders to evaluate on, whole; without any, a split of the run's own data.
    split
        test or validation, of the run's own data.
    checkpoint
        best (lowest validation loss), last, or a step number.
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        auto, float32, bfloat16 or float64; the run's own if left out.
    as_json
        Print the numbers as one JSON object.

    Examples
    --------
    quintic evaluate runs/book
    quintic evaluate runs/book other.txt --json
    quintic evaluate runs/flow pictures/
    """
    from quintic.cli.wiring import kind_of, load_run_model

    loaded = load_run_model(run, checkpoint, device, dtype)
    lines, facts = kind_of(loaded.header["task"]).evaluate(loaded, run, list(data), split)
    if as_json:
        say(json.dumps({"run": str(run), **facts}))
        return
    for line in lines:
        say(line)
