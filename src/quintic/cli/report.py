"""``quintic report``: one self-contained page about a run or a race."""

from __future__ import annotations

from pathlib import Path

from quintic.cli.printing import say

__all__ = ["report"]


def report(run: Path, /) -> None:
    """Write the page of a run or of a race from its records, and print where it is.

    Parameters
    ----------
    run
        A run folder, which may still be training, or the folder of a finished race.

    Examples
    --------
    quintic report runs/book
    quintic report runs/race
    """
    from quintic.core.files import check_name
    from quintic.report import write_report
    from quintic.report.race import write_race_report

    check_name(run)
    say(f"report: {write_race_report(run) if (run / 'race.json').exists() else write_report(run)}")
