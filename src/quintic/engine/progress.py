"""What a person sees while a run goes: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Display", "step_line"]

_SECONDS_BETWEEN_LINES = 5.0
_BAR = 16  # characters


def step_line(row: dict[str, Any], width: int | None = None) -> str:
    """One step in words, from its metrics; the most telling ones first, as many as fit in ``width`` characters."""
    parts = [f"loss {row['loss']:.3f}"]
    if "bits_per_byte" in row:
        parts.append(f"{row['bits_per_byte']:.3f} bits/byte")
    parts.append(f"lr {row['lr']:.4g}")
    parts.append(f"|g| {row['grad_norm']:.2f}")
    if row.get("max_vio"):
        parts.append(f"MaxVio {max(row['max_vio']):.2f}")
    parts.append(f"{row['tokens_per_second']:,.0f}/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


class Display:
    """Progress of one run.

    Args:
        console: Where to write.
        steps: Steps of the whole run.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self._bar: Progress | None = None
        self._last_line = 0.0

    @contextlib.contextmanager
    def live(self, step: int) -> Iterator[Display]:
        """Show the bar while the body runs, on a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=_BAR), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=self.console, transient=True,
        )  # fmt: skip
        with self._bar:
            self._task = self._bar.add_task("", total=self.steps, completed=step)
            yield self
        self._bar = None

    def step(self, row: dict[str, Any]) -> None:
        """Show a finished step."""
        if self._bar is not None:
            # "step", the count twice, the bar, the time left, and the gaps between them.
            taken = 4 + 2 * len(str(self.steps)) + 1 + _BAR + 7 + 5
            line = step_line(row, max(0, self.console.width - taken))
            self._bar.update(self._task, completed=row["step"], description=escape(line))
        now = time.monotonic()
        last = row["step"] == self.steps
        if self._bar is None and (last or row["step"] == 1 or now - self._last_line >= _SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.note(f"step {row['step']}/{self.steps}  {step_line(row)}")
        if "val_loss" in row:
            view = f", {row['val_bits_per_byte']:.3f} bits/byte" if "val_bits_per_byte" in row else ""
            self.note(f"step {row['step']}/{self.steps}  validation loss {row['val_loss']:.3f}{view}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
