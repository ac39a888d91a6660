"""``quintic verify-resume``: proof on your own run that stopping and resuming changes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from quintic.cli.printing import say
from quintic.core import QuinticError

__all__ = ["verify_resume"]


def verify_resume(run: Path, /, *, steps: int = 6, cut: int = 3) -> None:
    """Train a run's first steps twice, once with a stop and a resume in between, and compare every bit.

    The run itself is only read. Exit code 0 means: weights, optimizer, balance of the experts, random generators
    and metrics are equal bit for bit.

    Parameters
    ----------
    run
        The run folder, whose data and settings are used.
    steps
        Steps to train.
    cut
        Step after which one of the two is stopped and resumed.
    """
    from quintic.cli.wiring import build_task, open_run
    from quintic.engine.verification import verify_resume as verify

    _, settings, header = open_run(run)
    task, settings, _ = build_task(header["task"], [Path(path) for path in header["paths"]], settings)
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("training a few steps, twice"):
        result = verify(task, settings, Path(folder), steps=steps, cut=cut)
    if result.differences:
        shown = "".join(f"\n  {name}" for name in result.differences[:10])
        raise QuinticError(
            f"{result.steps} steps and {result.cut} steps + resume differ in {len(result.differences)} places:{shown}\n"
            "please report this with the run's config.toml and machine.json"
        )
    say(
        f"exact: {result.steps} steps equal {result.cut} steps, a stop and a resume, bit for bit "
        f"({result.tensors} tensors and all metrics compared)"
    )
