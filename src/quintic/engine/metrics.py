"""metrics.jsonl: one JSON object per optimizer step, the truth that reports are drawn from.

Rows are appended and handed to the system one by one, so a killed run leaves at most one torn last line. A resume cuts
the file back to the step it resumes from: no step is there twice, and none is missing unless the disk has lost it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quintic.core.files import atomic_write
from quintic.core.ranks import ALONE, Ranks

__all__ = ["MetricsFile", "iter_metrics", "read_metrics", "validation_loss"]

Row = dict[str, Any]

_MOST_STEPS = 2**53  # floats count no further


def iter_metrics(path: Path, containing: str = "") -> Iterator[Row]:
    """The whole rows of a metrics file, one by one; none if it does not exist. What is torn or damaged is left out.

    Args:
        path: The file.
        containing: Only rows whose text has this in it are parsed and given.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if containing not in line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(step := row.get("step")) is int and 0 < step < _MOST_STEPS:
                yield row


def read_metrics(path: Path) -> list[Row]:
    """All rows of :func:`iter_metrics`."""
    return list(iter_metrics(path))


def validation_loss(row: Row) -> float | None:
    """The validation loss of a row, as it is written; None without one that is a finite number."""
    value = _plain(row.get("val_loss"))
    return value if isinstance(value, float) else None


class MetricsFile:
    """Append rows to a metrics file.

    Args:
        path: The file; created if absent.
        keep_through: Step that training continues from; rows of later ones are dropped.
        ranks: Of them the first reads and writes; all of them make one of these, and follow its steps.
        sink: Is given every new row as it is written.
        warn: Told of rows that are missing before that step: a crash of the machine takes what was not on the disk yet.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_through: int,
        ranks: Ranks = ALONE,
        sink: Callable[[Row], None] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        kept = [row for row in iter_metrics(path) if row["step"] <= keep_through] if ranks.is_main else []
        best = min((loss for row in kept if (loss := validation_loss(row)) is not None), default=math.inf)
        # What the first rank has read: on a shared disk another may still see the file as it was.
        self.last_row: Row
        self.last_row, self._best = ranks.gather((kept[-1] if kept else {}, best))[0]
        self.last_step: int = self.last_row.get("step", 0)
        """Step of the last row; 0 before the first."""
        if self.last_step < keep_through - 1:  # the row of keep_through itself is in the checkpoint
            warn(f"{path} has lost the rows of steps {self.last_step + 1} to {keep_through - 1}; nothing else is lost")
            self.last_step = keep_through - 1
        self._sink = sink if ranks.is_main else None
        self._file = None
        if ranks.is_main:
            atomic_write(path, "".join(map(_line, kept)))
            self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write one row and hand it to the system."""
        assert row["step"] == self.last_step + 1, f"step {row['step']} after {self.last_step}"
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()
        self.last_row, self.last_step = row, row["step"]
        if (loss := validation_loss(row)) is not None:
            self._best = min(self._best, loss)
        if self._sink is not None:
            self._sink(_plain(row))

    def improves(self, row: Row) -> bool:
        """Whether a row has a lower validation loss than all before it."""
        loss = validation_loss(row)
        return loss is not None and loss < self._best

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
