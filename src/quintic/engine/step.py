"""One optimizer step, and its line of metrics: gradients of the batch, clipping, the update, what it did.

A pure function of the state before it; see :mod:`quintic.engine.loop` for what happens between steps.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quintic.core import QuinticError
from quintic.core.counter_rng import Stream
from quintic.core.machine import autocast
from quintic.core.ranks import Ranks
from quintic.data.order import Order
from quintic.engine.checkpoint import TrainState
from quintic.engine.config import EngineConfig
from quintic.engine.periods import every
from quintic.engine.shard import sum_over_replicas
from quintic.engine.spikes import remember, spike_score
from quintic.engine.task import Batch, Task
from quintic.engine.utilization import Peak
from quintic.optim import ClipResult, GradientClipping, Muon, OptimConfig, diagnose, lr_factor, momentum_at, snapshot
from quintic.optim.sharded import local

__all__ = ["StepParts", "TrainingError", "take_step"]


class TrainingError(QuinticError):
    """Training cannot go on: the loss or the gradient is no longer finite."""


class StepParts(NamedTuple):
    """What every step uses and no step replaces."""

    task: Task
    model: nn.Module
    optimizer: Muon
    clipping: GradientClipping
    order: Order
    engine: EngineConfig
    optim: OptimConfig
    dtype: torch.dtype
    flops: float
    """Of one step."""
    peak: Peak | None
    """Of the matrix product here, if measured."""
    ranks: Ranks


def take_step(parts: StepParts, state: TrainState) -> None:
    """Advance model, optimizer and state by one step, and fill ``state.row`` with its metrics.

    Raises:
        TrainingError: Loss or gradient is not finite, and such a step is not to be left out; nothing was updated.
    """
    task, model, optimizer, clipping, order, engine, optim, _, flops, peak, ranks = parts
    started = time.perf_counter()
    examples = order.examples(state.step * engine.batch_size, engine.batch_size)
    # Dropout and noise are a function of the step, so that no generator needs saving; ranks draw their own.
    noise = int(Stream(engine.seed, "step", state.step, ranks.rank).words(0, 1)[0]) >> 1
    total, count, batch = _gradients(parts, examples, noise)

    before_optimizer = time.perf_counter()
    clip = clipping(model)
    norm = float(clip.norm)
    finite = math.isfinite(total) and math.isfinite(norm)
    if not finite and engine.on_nonfinite == "stop":
        raise TrainingError(
            f"step {state.step + 1}: loss {total / count:.4g}, gradient norm {norm:.4g} - not finite; nothing was "
            f"updated. Its examples were {', '.join(map(str, examples.tolist()))}. "
            "What was saved before is intact; start a new run with a lower optim.lr or a longer warm-up, "
            "or leave such steps out with engine.on_nonfinite=skip"
        )
    factor = lr_factor(state.step, engine.steps, optim)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        group["momentum"] = momentum_at(state.step, engine.steps, optim)
    diagnosed = finite and ranks.world == 1 and every(engine.diagnose_every, state.step + 1)
    before = snapshot(optimizer) if diagnosed else None
    if finite:
        optimizer.step()
    after_optimizer = time.perf_counter()
    stats: dict[str, Any] = {}
    if before is not None:  # before anything else changes the weights
        observed = None if batch is None else (_loss_again(parts, batch, noise) - total) / count
        stats = _diagnosis(parts, before, clip, observed)
    diagnosing = time.perf_counter() - after_optimizer
    if optim.name == "muon" and optim.adamw_lr >= 0.0:
        stats["adamw_lr"] = optim.adamw_lr * factor
    if optim.cap:
        stats["cap_factor"] = float(optimizer.cap_factor)
    stats |= task.after_step(model, (state.step + 1) / engine.steps)
    seconds = time.perf_counter() - diagnosing - started

    if finite:
        state.skipped_in_a_row = 0
        if (spike := spike_score(state.recent_losses, total / count)) is not None:
            stats["spike"] = spike
        state.recent_losses = remember(state.recent_losses, total / count)
    else:
        state.skipped_in_a_row += 1
        stats["skipped_examples"] = examples.tolist()
    state.step += 1
    state.counted += int(count)
    state.clipped += int(clip.clipped)
    state.clipping = clipping.state_dict()
    state.seconds += seconds
    if state.step % engine.load_every and state.step != 1:
        for name in ("expert_load", "expert_bias"):
            stats.pop(name, None)
    state.row = {
        "step": state.step,
        "loss": total / count,
        **task.step_metrics(total / count),
        "lr": optim.lr * factor,
        "grad_norm": norm,
        "clip_fraction": state.clipped / state.step,
        "clip_threshold": float(clip.threshold),
        "tokens": state.counted,
        "seconds": state.seconds,
        "tokens_per_second": count / seconds,
        "optimizer_share": (started + seconds - before_optimizer) / seconds,
        "mfu": peak.reached_by(flops / ranks.world, seconds) if peak else None,
        **stats,
    }


def _gradients(parts: StepParts, examples: NDArray[Any], noise: int) -> tuple[float, float, Batch | None]:
    """Gradients of the mean loss of a batch, taken in micro-batches and summed over ranks.

    Returns:
        The summed loss and over how many elements, of all ranks; and this rank's batch, if it was taken at once.
    """
    task, model, ranks = parts.task, parts.model, parts.ranks
    device = next(model.parameters()).device
    torch.manual_seed(noise)
    model.train()
    parts.optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    own = examples[ranks.rank :: ranks.world]
    size = parts.engine.micro_batch_size or len(own)
    batch: Batch = {}
    for start in range(0, len(own), size):
        batch = task.batch(own[start : start + size])
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(device, parts.dtype, cache=False):
            loss = task.loss(model, batch)
        if size < len(own):
            sum_over_replicas(model, now=start + size >= len(own))
        (loss.total if loss.regularizer is None else loss.total + loss.regularizer).backward()
        total += float(loss.total.detach())
        count += loss.count
    total, count = ranks.sum(total, count)
    # Sums over elements were differentiated: one division makes the mean, however the batch was cut and shared out.
    with torch.no_grad():
        torch._foreach_mul_([local(p.grad) for p in model.parameters() if p.grad is not None], 1.0 / count)
    return total, count, batch if size >= len(own) else None


def _diagnosis(
    parts: StepParts, before: Mapping[Tensor, Tensor], clip: ClipResult, observed: float | None
) -> dict[str, Any]:
    """What the step did to the weights, as metrics."""
    # Spectral clipping has no one factor: its diagnosis is that of the clipped gradient.
    scale = 1.0 if parts.optim.clip == "spectral" else float(clip.scale)
    found = diagnose(parts.model, parts.optimizer, before, clip_scale=scale, observed_change=observed)
    return {**found.metrics, "layer_share": found.layers, "spectra": found.spectra}


@torch.no_grad()
def _loss_again(parts: StepParts, batch: Batch, noise: int) -> float:
    """Summed loss of the batch that was just trained on, with the same noise, and without counting as training."""
    torch.manual_seed(noise)
    parts.model.eval()
    try:
        with autocast(next(parts.model.parameters()).device, parts.dtype):
            return float(parts.task.loss(parts.model, batch).total)
    finally:
        parts.model.train()
