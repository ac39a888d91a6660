"""More steps for a run: a new run that goes on from a checkpoint of the old one, its optimizer and place in the data.

Under ``wsd`` the checkpoint is the last one before the learning rate fell, so that the longer run has the schedule of
a run that was meant to be as long; that is what the schedule is for (MiniCPM, arXiv 2404.06395). The old run stays as
it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quintic.core import CheckpointError, ConfigError
from quintic.core.files import atomic_folder, atomic_write
from quintic.engine.checkpoint import list_checkpoints, verify_checkpoint
from quintic.engine.config import Settings
from quintic.engine.run import Run
from quintic.optim.lr import decay_start, lr_factor

__all__ = ["extend_run"]

_OF_THE_END = ("status", "steps", "error", "log_id")


def extend_run(
    run: Run,
    folder: Path,
    settings: Settings,
    header: Mapping[str, Any],
    planned: int,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Make a run of more steps from one of fewer.

    Args:
        run: Is only read.
        folder: The new run folder.
        settings: Those of ``run``, but for ``engine.steps``.
        header: Top-level keys of its ``config.toml``.
        planned: The steps that ``run`` was meant to have.
        say: Told from which step the new run goes on, and of damaged checkpoints.

    Returns:
        The new run, to be trained as one that was stopped.

    Raises:
        ConfigError: The run has as many steps.
        CheckpointError: It has no usable checkpoint, or the folder is in use.
    """
    optim, steps = settings["optim"], settings["engine"].steps
    if steps <= planned:
        raise ConfigError(f"{run.folder} has {planned} steps already: --steps, the number of all steps, must be more")
    Run.refuse_existing(folder)
    stable = decay_start(planned, optim)
    step, checkpoint = _choose(run, planned if stable is None else stable, say)
    before, after = (lr_factor(step - 1, total, optim) for total in (planned, steps))
    words = f"going on from step {step} of {run.folder}"
    if before < after:
        words += (
            f", where the learning rate had come down to {before:.2g} of its peak; it begins again with {after:.2g}"
        )
    say(words)
    folder.mkdir(parents=True, exist_ok=True)
    folder.rmdir()  # it was empty, and is put in its place whole
    with atomic_folder(folder) as temporary:
        new = Run(temporary)
        new.checkpoints.mkdir()
        shutil.copytree(checkpoint, new.checkpoints / checkpoint.name)
        for file in (run.metrics_file, run.initial, run.folder / "machine.json"):
            if file.exists():
                shutil.copyfile(file, temporary / file.name)
        new.record(**{name: fact for name, fact in run.facts().items() if name not in _OF_THE_END})
        more = {"extends": str(run.folder.absolute()), "extends_step": step}
        atomic_write(new.config_file, settings.to_toml({**_plain(header), **more}))
    return Run(folder)


def _choose(run: Run, last: int, say: Callable[[str], None]) -> tuple[int, Path]:
    """The newest usable checkpoint through step ``last``; if none is left, the oldest of the others."""
    found = list_checkpoints(run.checkpoints)
    order = sorted(found, key=lambda step: (step > last, step if step > last else -step))
    for step in order:
        try:
            verify_checkpoint(found[step])
        except CheckpointError as error:
            say(f"{error}; trying another one")
            continue
        return step, found[step]
    raise CheckpointError(f"{run.folder} has no usable checkpoint to go on from; train it first")


def _plain(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if not isinstance(value, dict)}
