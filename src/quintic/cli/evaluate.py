"""``quintic evaluate``: loss and bits per byte on text that was not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.printing import say
from quintic.core import ConfigError

__all__ = ["evaluate"]


def evaluate(
    run: Path,
    /,
    *arguments: str | Path,
    split: str = "test",
    label: Annotated[str | None, Parameter(name="--class")] = None,
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
    arguments
        Files and folders to evaluate on, all of them; without any, a split of the run's own data. For other text also
        how to read it: data.field=..., data.encoding=...; and data.test_fraction=0.05 for its last 5 % alone, the test
        split of a run on it. The rest is as in the run.
    split
        Split of the run's own data: test or validation.
    label
        Class of all pictures that are named, its name or number, or -1 for none; left out, it is that of the folder of
        each, as in training, if the model has learned classes.
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
    quintic evaluate runs/book other.jsonl data.field=body
    quintic evaluate runs/flow pictures/
    quintic evaluate runs/flow others/ --class cat --json
    """
    from quintic.cli.wiring import kind_of, load_run_model, split_arguments

    paths, overrides = split_arguments(arguments)
    loaded = load_run_model(run, checkpoint, device, dtype)
    kind = kind_of(loaded.header["task"])
    settings = loaded.settings.override(overrides)
    for key in (override.partition("=")[0] for override in overrides):
        if key not in kind.OF_FILES:
            known = f"take {' or '.join(kind.OF_FILES)}" if kind.OF_FILES else "take none for images"
            raise ConfigError(f"{key} is a setting of training; evaluations {known}")
        if not paths:
            raise ConfigError(f"{key} is for other text, and none is named; the run's own data is read as in training")
    options = {} if label is None else {"label": label}
    lines, facts = kind.evaluate(loaded._replace(settings=settings), run, paths, split, options)
    if as_json:
        say(json.dumps({"run": str(run), "step": loaded.step, **facts}))
        return
    if loaded.step is not None:
        say(f"weights of step {loaded.step:,}")
    for line in lines:
        say(line)
