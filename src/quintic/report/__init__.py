"""The report of a run: one self-contained HTML page, drawn from the run folder's own records."""

from quintic.report.page import write_report

__all__ = ["write_report"]
