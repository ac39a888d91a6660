"""Which window inverts each block of a flow soonest, on this machine and at this batch size.

Cost of a window = sum over its sweeps of the measured time of a sweep of that many tokens, plus the check. How many
sweeps a block needs is counted on a few latents; what a sweep costs is timed at the batch size asked for, at a few
widths, with straight lines between them. Token by token costs about the work of one parallel pass but many small steps;
guessing multiplies the work and saves steps, so that it pays for small batches and for the blocks that converge fast.
Timings decide nothing but speed: every plan gives the same images, to rounding.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quintic.core.counter_rng import Stream
from quintic.core.settings import check_counts
from quintic.flow.guidance import Guidance
from quintic.flow.invert import Tolerance, Workspace, invert_block, step_, sweep_
from quintic.flow.precision import full_precision

if TYPE_CHECKING:
    from quintic.flow.block import FlowBlock
    from quintic.flow.tarflow import TarFlow

__all__ = ["SamplingPlan", "plan_sampling"]

_CALIBRATION = 4
_REPEATS = 5
_WINDOWS = (4, 16)
_CLEARLY = 0.85
_plans: weakref.WeakKeyDictionary[TarFlow, dict[tuple[int, Guidance | None], SamplingPlan]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class SamplingPlan:
    """A window for every block, and why."""

    batch: int
    windows: tuple[int, ...]
    """By block."""
    seconds: tuple[dict[int, float], ...]
    """By block: predicted time of each window that was considered."""
    sweeps: tuple[dict[int, int], ...]
    """By block: sweeps that each window needed."""

    def table(self) -> str:
        """The plan in lines for a person."""
        lines = [f"batch {self.batch}"]
        for block, (window, seconds, sweeps) in enumerate(zip(self.windows, self.seconds, self.sweeps, strict=True)):
            tried = ", ".join(f"{w}: {sweeps[w]} sweeps {1e3 * s:.1f} ms" for w, s in seconds.items())
            lines.append(f"block {block}: window {window}  ({tried})")
        return "\n".join(lines)


def plan_for(model: TarFlow, batch: int, rows: Tensor | None, guidance: Guidance | None) -> SamplingPlan:
    """The plan of a model and batch size, made at the first call and remembered while the model lives."""
    known = _plans.setdefault(model, {})
    guidance = guidance if guidance is not None and guidance.weight else None  # without weight it is none
    key = (batch, guidance)
    if key not in known:
        label = None if rows is None else rows[:1]
        known[key] = plan_sampling(model, batch, guidance=guidance, row=label)
    return known[key]


def plan_sampling(
    model: TarFlow, batch: int, *, guidance: Guidance | None = None, row: Tensor | None = None, seed: int = 0
) -> SamplingPlan:
    """Measure and choose.

    Args:
        model: A flow whose direction is ``density``.
        batch: Images at a time.
        guidance: As it will be used.
        row: (1,) row of the class tables to calibrate with; None is "no label".
        seed: Of the latents to calibrate with.

    Raises:
        ConfigError: The batch has less than one image, or the weights are in half precision.
    """
    check_counts(batch=batch)
    with torch.inference_mode(), full_precision(model.stack[0].position):
        return _measured(model, batch, guidance, row, seed)


def _measured(model: TarFlow, batch: int, guidance: Guidance | None, row: Tensor | None, seed: int) -> SamplingPlan:
    blocks = model.stack
    weight = blocks[0].position
    if row is None and model.num_classes:
        row = torch.full((1,), model.num_classes, dtype=torch.int64, device=weight.device)

    def rows(n: int) -> Tensor | None:
        return None if row is None else row.expand(n)

    few = min(batch, _CALIBRATION)
    normal = Stream(seed, "plan").normal(0, few * model.dims)
    x = torch.from_numpy(normal).to(weight).view(few, model.tokens, model.numbers)
    if model.prior_log_variance is not None:
        x = x * torch.exp(0.5 * model.prior_log_variance)
    if model.behind is not None:
        x = model.behind.inverse(x)
    small, full = Workspace(model, few, rows(few), guidance), Workspace(model, batch, rows(batch), guidance)
    cost, check_seconds = _sweep_costs(full, blocks[0], x.new_zeros(batch, model.tokens, model.numbers))
    tolerance = Tolerance.of(weight.dtype).guess
    all_seconds, all_sweeps = [], []
    for block in reversed(blocks):
        folded = small.fold(block)
        z = block.ordered(x)
        seconds, sweeps = {}, {}
        found = z
        for window in cost:
            found, widths = invert_block(small, folded, z, window, tolerance)
            check = check_seconds if window > 1 else 0.0
            seconds[window] = float(np.interp(widths, list(cost), list(cost.values())).sum()) + check
            sweeps[window] = len(widths)
        x = block.ordered(found)
        all_seconds.append(seconds)
        all_sweeps.append(sweeps)
    all_seconds.reverse()
    all_sweeps.reverse()
    chosen = tuple(_choose(seconds) for seconds in all_seconds)
    return SamplingPlan(batch, chosen, tuple(all_seconds), tuple(all_sweeps))


def _choose(seconds: dict[int, float]) -> int:
    """The quickest window, but guessing must promise a clear gain: its sweeps differ from latent to latent."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _CLEARLY * seconds[1] else 1


def _sweep_costs(workspace: Workspace, block: FlowBlock, x_bnd: Tensor) -> tuple[dict[int, float], float]:
    """Seconds of a sweep by its width, behind half of the other tokens, and seconds of the check.

    Widths whose two sweeps, the least that guessing takes, cost more than the sequential inverse are left out.
    """
    folded = workspace.fold(block)
    workspace.room.array.zero_()
    last = x_bnd.shape[1] - 1
    found: dict[int, float] = {}
    for width in sorted({1, *(w for w in _WINDOWS if w < last), last}):
        start = (last - width) // 2
        if width == 1:
            call = partial(step_, workspace, folded, x_bnd.clone().unbind(1), start)
        else:
            call = partial(sweep_, workspace, folded, x_bnd.clone(), x_bnd, start, start + width, 0.0)
        found[width] = _best_seconds(call)
        if width > 1 and 2 * found[width] > last * found[1]:
            del found[width]
            break
    check = _best_seconds(lambda: workspace.residual(block, x_bnd, x_bnd)) if len(found) > 1 else 0.0
    return found, check


def _best_seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best
