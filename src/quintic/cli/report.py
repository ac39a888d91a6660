"""``quintic report``: one self-contained page about a run."""

from __future__ import annotations

from pathlib import Path

from quintic.cli.printing import say

__all__ = ["report"]


def report(run: Path, /) -> None:
    """Write RUN/report.html from the run's records and print where it is.

    Parameters
    ----------
    run
        The run folder; it may still be training.
    """
    from quintic.report import write_report

    say(f"report: {write_report(run)}")
