"""A loss that leaps: how many standard deviations it lies above the losses of the last steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["SPIKE", "remember", "spike_score"]

SPIKE = 6.0
"""Standard deviations from which a loss is called a spike."""
_WINDOW = 128
_ENOUGH = 32


def spike_score(recent: Sequence[float], loss: float) -> float | None:
    """(loss - mean) / standard deviation of the recent losses; None before there are enough of them.

    Args:
        recent: Losses of the last steps, see :func:`remember`.
        loss: Of this step, not among them.

    Example:
        >>> spike_score([2.0, 2.2] * 16, 3.1)
        10.0
        >>> spike_score([2.0], 9.0) is None
        True
    """
    if len(recent) < _ENOUGH:
        return None
    spread = statistics.pstdev(recent)
    return round((loss - statistics.fmean(recent)) / spread, 3) if spread else 0.0


def remember(recent: Sequence[float], loss: float) -> list[float]:
    """The losses of the last steps with one more, and without the oldest if they become too many."""
    return [*recent, loss][-_WINDOW:]
