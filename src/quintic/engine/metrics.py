"""metrics.jsonl: one JSON object per optimizer step, the truth that reports are drawn from.

Rows are appended and flushed one by one, so a killed run leaves at most one torn last line. A resume cuts the
file back to the step it resumes from: no step is missing or there twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quintic.core.files import atomic_write

__all__ = ["MetricsFile", "iter_metrics", "read_metrics"]

Row = dict[str, Any]


def iter_metrics(path: Path, containing: str = "") -> Iterator[Row]:
    """The whole rows of a metrics file, one by one; none if it does not exist. A torn last line is left out.

    Args:
        path: The file.
        containing: Only rows whose text has this in it are parsed and given.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if containing not in line:
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # torn by a kill; nothing whole follows


def read_metrics(path: Path) -> list[Row]:
    """All rows of :func:`iter_metrics`."""
    return list(iter_metrics(path))


class MetricsFile:
    """Append rows to a metrics file.

    Args:
        path: The file; created if absent.
        keep_through: Rows of later steps are dropped first.
        write: False only follows the steps: of several ranks one writes.
        sink: Is given every new row as it is written.
    """

    def __init__(
        self, path: Path, *, keep_through: int, write: bool = True, sink: Callable[[Row], None] | None = None
    ) -> None:
        self.last_row: Row = {}
        self._sink = sink if write else None
        kept = []
        for row in iter_metrics(path):
            if row["step"] <= keep_through:
                kept.append(_line(row))
                self.last_row = row
        self._file = None
        if write:
            atomic_write(path, "".join(kept))
            self._file = path.open("a", encoding="utf-8")

    @property
    def last_step(self) -> int:
        """Step of the last row; 0 before the first."""
        return self.last_row.get("step", 0)

    def append(self, row: Row) -> None:
        """Write one row and hand it to the system."""
        assert row["step"] == self.last_step + 1, f"step {row['step']} after {self.last_step}"
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()
        self.last_row = row
        if self._sink is not None:
            self._sink(_plain(row))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _line(row: Row) -> str:
    return json.dumps(_plain(row)) + "\n"


def _plain(value: Any) -> Any:
    """Round floats to 7 digits and write non-finite ones as null, which every JSON reader accepts."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
