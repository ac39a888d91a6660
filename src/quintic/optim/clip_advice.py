"""Is the clipping threshold sensible? Statistics of the recorded gradient norms, and one line of advice.

"The threshold is sensible if most norms are below it and few above" (post kexue.fm/archives/10657): then clipping
guards against outliers. If it never acts it is the identity, and if it always acts the optimizer sees normalised
gradients. Pure functions of recorded numbers, so the advice can be had for any run that wrote its norms down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quintic.core import ConfigError

__all__ = ["ClipStatistics", "advice", "clip_statistics"]

_EARLY = 0.1  # of the run: where warm-up usually is
_OFTEN, _MOSTLY = 0.1, 0.5  # shares of clipped steps from which on clipping is more than a guard


@dataclass(frozen=True)
class ClipStatistics:
    """Norms of a run before clipping, and what the threshold did to them."""

    steps: int
    clipped: int
    """Steps with a finite norm above the threshold."""
    early: int
    """Those of them within the first tenth of the run."""
    nonfinite: int
    """Steps with a norm that is NaN or infinite."""
    p50: float
    """Median of the finite norms; this and the next three are NaN without any."""
    p90: float
    p99: float
    largest: float
    threshold: float
    """The last one used; infinite without clipping."""

    @property
    def clip_fraction(self) -> float:
        """Share of the steps that were clipped; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0


def clip_statistics(norms: Sequence[float], threshold: float | Sequence[float]) -> ClipStatistics:
    """Statistics of the norms of consecutive steps.

    Args:
        norms: One global norm before clipping per step, in order.
        threshold: The clipping threshold, or one per step if it adapts.

    Raises:
        ConfigError: As many thresholds as norms were expected.

    Example:
        >>> found = clip_statistics([0.5, 0.7, 3.0, float("nan")], 1.0)
        >>> found.clipped, found.nonfinite, found.p50, found.largest, found.clip_fraction
        (1, 1, 0.7, 3.0, 0.25)
    """
    norm = np.asarray(norms, dtype=np.float64)
    limit = np.asarray(threshold, dtype=np.float64)
    if limit.ndim and limit.shape != norm.shape:
        raise ConfigError(f"{limit.size} thresholds for {norm.size} norms; expected one number, or one per norm")
    limit = np.broadcast_to(limit, norm.shape)
    finite = np.isfinite(norm)
    clipped = finite & (norm > limit)
    first = math.ceil(_EARLY * norm.size)
    known = norm[finite]
    p50, p90, p99, largest = np.quantile(known, [0.5, 0.9, 0.99, 1.0]).tolist() if known.size else [math.nan] * 4
    last = float(limit[-1]) if norm.size else (float(threshold) if not isinstance(threshold, Sequence) else math.nan)
    return ClipStatistics(
        steps=norm.size,
        clipped=int(clipped.sum()),
        early=int(clipped[:first].sum()),
        nonfinite=int((~finite).sum()),
        p50=p50,
        p90=p90,
        p99=p99,
        largest=largest,
        threshold=last,
    )


def advice(found: ClipStatistics) -> str:
    """One line on what the clipping did and what to try, for a report.

    Example:
        >>> advice(clip_statistics([0.2, 0.3, 0.25, 0.4], 1.0))
        'nothing was clipped: the largest norm was 0.4, the threshold is 1; at 0.397 (P99) it would catch outliers'
    """
    if not found.steps:
        return "no gradient norms were recorded"
    if found.nonfinite:
        return (
            f"the gradient was not finite at {found.nonfinite} of {found.steps} steps, which changed nothing: "
            "lower the learning rate or lengthen the warm-up"
        )
    if math.isinf(found.threshold):
        return f"gradients were not clipped; a threshold near {found.p99:.3g} (P99 of the norms) would catch outliers"
    share = found.clip_fraction
    if not found.clipped:
        return (
            f"nothing was clipped: the largest norm was {found.largest:.3g}, the threshold is {found.threshold:.3g}; "
            f"at {found.p99:.3g} (P99) it would catch outliers"
        )
    what = f"{share:.{0 if share >= 0.01 else 2}%} of the steps were clipped"
    if found.early >= 0.8 * found.clipped and found.steps >= 2 / _EARLY:
        return (
            f"{what}, nearly all within the first tenth of the run: that is the start and not outliers; "
            "a longer warm-up does the same"
        )
    if share >= _MOSTLY:
        return (
            f"{what}: the threshold {found.threshold:.3g} is below the median norm {found.p50:.3g}, so gradients are "
            f"normalised rather than guarded; a threshold of {found.p90:.3g} (P90) would clip a tenth"
        )
    if share >= _OFTEN:
        return (
            f"{what}, more than outliers alone: the median norm is {found.p50:.3g}, the threshold "
            f"{found.threshold:.3g}; one of {found.p90:.3g} (P90) would clip a tenth"
        )
    return f"{what}: a guard against outliers, as it should be (median norm {found.p50:.3g})"
