"""``quintic report``: one self-contained page about a run, a race, or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quintic.cli.outputs import output_path
from quintic.cli.printing import say
from quintic.core import ConfigError

__all__ = ["report"]


def report(
    run: Path,
    /,
    *others: Path,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    overwrite: bool = False,
) -> None:
    """Write the page of a run or of a race from its records, or one that compares runs, and print where it is.

    Parameters
    ----------
    run
        A run folder, which may still be training, or the folder of a finished race.
    others
        Further runs of the same task, to be compared with it.
    out
        HTML file of a comparison; comparison.html beside the first run if left out, with a number if there is one. The
        page of a run or a race is in its folder, and is written anew.
    overwrite
        Replace a comparison that exists.

    Examples
    --------
    quintic report runs/book
    quintic report runs/race
    quintic report runs/a runs/b runs/c
    """
    from quintic.core.files import check_folder, check_name
    from quintic.report import write_report
    from quintic.report.comparison import check_runs, write_comparison
    from quintic.report.race import write_race_report

    folders = [run, *others]
    for folder in folders:
        check_name(folder)
    if others:
        if out is not None and out.suffix.lower() != ".html":
            raise ConfigError(f"--out {out}: the page is an HTML file; choose a name that ends in .html")
        runs = check_runs(folders)
        path = output_path(
            out, (run if run.name not in ("", "..") else run.resolve()).parent / "comparison.html", overwrite
        )
        check_folder(path.parent)
        say(f"report: {write_comparison(runs, path)}")
        return
    if out is not None or overwrite:
        raise ConfigError("--out and --overwrite are for a comparison of several runs; that of one is in its folder")
    say(f"report: {write_race_report(run) if (run / 'race.json').exists() else write_report(run)}")
