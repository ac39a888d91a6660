"""``quintic report``: one self-contained page about a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

__all__ = ["report"]


def report(run: Path, /) -> None:
    """Write RUN/report.html from the run's records and print where it is.

    Parameters
    ----------
    run
        The run folder; it may still be training.
    """
    from quintic.report import write_report

    Console().print(f"report: {write_report(run)}", markup=False, highlight=False, soft_wrap=True)
