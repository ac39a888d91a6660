"""``quintic verify-resume``: proof on your own run that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from quintic.cli.printing import say
from quintic.core import QuinticError

__all__ = ["verify_resume"]


def verify_resume(
    run: Path,
    /,
    *data: str | Path,
    steps: int = 6,
    cut: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a run's first steps twice, once with a stop and a resume in between, and compare every bit.

    The run itself is only read. Exit code 0 means that weights, optimizer state, expert balance, random generators
    and metrics are equal bit for bit.

    Parameters
    ----------
    run
        The run folder, whose data and settings are used.
    data
        Where the data is now, if it was moved.
    steps
        Steps to train, at least 2; as many as the run has if those are fewer.
    cut
        Step after which one of the two is stopped and resumed; half-way if left out.
    as_json
        Print the result as JSON; the exit code is still 1 if something differs.

    Examples
    --------
    quintic verify-resume runs/book
    quintic verify-resume runs/book --steps 20 --cut 7
    """
    from quintic.cli.resume import check_data, data_of
    from quintic.cli.wiring import build_task, open_run, refuse_untrained
    from quintic.engine.verification import verify_resume as verify

    folder, settings, header = open_run(run)
    refuse_untrained(run, header)
    initial = folder.initial if folder.initial.exists() else None
    task, settings, _ = build_task(header["task"], data_of(run, header, data), settings)
    check_data(run, header, task)
    with tempfile.TemporaryDirectory() as empty, Console(stderr=True).status("training a few steps, twice"):
        result = verify(task, settings, Path(empty), steps=steps, cut=cut, initial=initial)
    if as_json:
        say(json.dumps({"exact": not result.differences, **asdict(result)}))
    if result.differences:
        shown = "".join(f"\n  {name}" for name in result.differences[:10])
        raise QuinticError(
            f"{result.steps} steps and {result.cut} steps + resume differ in {len(result.differences)} places:{shown}\n"
            "please report this with the run's config.toml and machine.json"
        )
    if as_json:
        return
    part = f"{result.cut} step" + "s" * (result.cut != 1)
    say(
        f"exact: {result.steps} steps equal {part}, a stop and a resume, bit for bit "
        f"({result.tensors} tensors and all metrics compared)"
    )
