"""The training loop, for every task. Read it top to bottom: it is the story of a run.

config -> data -> task and model -> (loss, stats) -> optimizer -> metrics -> checkpoint. A step is a pure function of
the state before it: the examples of step s are positions s B to (s + 1) B of an order fixed by (data, seed), and so is
the noise it draws, so a checkpoint needs to remember only s. Order of events after a step: save, then validate, then
sample, then write the step's metrics; a crash in any of them loses nothing that was learned.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from quintic.core import QuinticError
from quintic.core.counter_rng import Stream
from quintic.core.initial import initialize_
from quintic.core.machine import autocast, describe, peak_memory_bytes, pick_device
from quintic.core.ranks import ALONE, Ranks
from quintic.data.order import Order
from quintic.engine.averaging import WeightAverage
from quintic.engine.checkpoint import (
    TrainState,
    clear_leftovers,
    load_average,
    load_model,
    load_training,
    load_weights,
    prune_checkpoints,
    usable_checkpoint,
)
from quintic.engine.config import EngineConfig, Settings
from quintic.engine.hardware import agreed_dtype, changes
from quintic.engine.metrics import MetricsFile
from quintic.engine.periods import due_after, every
from quintic.engine.plan import check_batch
from quintic.engine.progress import Display
from quintic.engine.run import Run
from quintic.engine.saving import Saver
from quintic.engine.shard import divide_, put_away, sum_over_replicas
from quintic.engine.signals import stop_requests
from quintic.engine.sinks import open_sink
from quintic.engine.spikes import SPIKE, remember, spike_score
from quintic.engine.task import Batch, Task
from quintic.engine.utilization import Peak
from quintic.optim import GradientClipping, OptimConfig, build_optimizer, diagnose, lr_factor, momentum_at, snapshot

__all__ = ["Outcome", "TrainingError", "train"]


class TrainingError(QuinticError):
    """Training cannot go on: the loss or the gradient is no longer finite."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    finished: bool
    """False if a signal stopped it; ``resume`` continues."""
    step: int
    """Steps taken in total."""
    recorded: int
    """Steps whose metrics are written; one less than ``step`` if a validation was cut short."""
    row: dict[str, Any]
    """Metrics of the last step."""
    sample: str
    """The last sample in words; empty if none was made."""
    peak_memory: int | None
    """Bytes, where the system tells."""


def train(
    task: Task,
    settings: Settings,
    run: Run,
    console: Console,
    *,
    quiet_peak: bool = False,
    stop_at: int | None = None,
    ranks: Ranks = ALONE,
    log: str = "",
) -> Outcome:
    """Train from the newest checkpoint of a run, or from the start if it has none.

    Args:
        task: What to train.
        settings: Resolved settings with sections ``engine`` and ``optim``.
        run: An existing run folder, :meth:`quintic.engine.run.Run.create` or ``open``.
        console: Where progress goes.
        quiet_peak: Skip the measurement of the matrix-product peak (MFU is then null).
        stop_at: Save and stop after this step, as a signal would make it.
        ranks: The processes that train together; all of them call this with the same arguments.
        log: Where metrics go besides the run folder, one of :data:`quintic.engine.sinks.SINKS`; empty for nowhere.

    Raises:
        TrainingError: Loss or gradient is not finite; the weights of the last checkpoint are intact.
        CheckpointError: Every checkpoint is damaged or does not fit, or another process trains this run.
        ConfigError: The batch does not divide among the ranks.
    """
    check_batch(settings["engine"].batch_size, ranks.world)
    with contextlib.ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(run.locked()) if ranks.is_main else None)
        try:
            return _train(task, settings, run, console, quiet_peak, stop_at, ranks, log)
        except Exception:
            if ranks.is_main:  # the disk may be what failed
                with contextlib.suppress(OSError, QuinticError):
                    run.record(status="failed")
            raise


def _train(
    task: Task,
    settings: Settings,
    run: Run,
    console: Console,
    quiet_peak: bool,
    stop_at: int | None,
    ranks: Ranks,
    log: str,
) -> Outcome:
    engine: EngineConfig = settings["engine"]
    optim: OptimConfig = settings["optim"]
    device = pick_device(engine.device)
    earlier = run.machine()
    dtype = agreed_dtype(engine.dtype, earlier, device, ranks)
    peak = None if quiet_peak or not ranks.is_main else Peak(device, dtype)
    facts = describe(device, dtype) | ({"ranks": ranks.world} if ranks.world > 1 else {})
    if ranks.is_main:
        run.record_machine(facts | _rate(peak))
        run.record(status="running")
        run.checkpoints.mkdir(exist_ok=True)
        clear_leftovers(run.checkpoints)
        run.samples.mkdir(exist_ok=True)
        task.save_with(run.folder)
    ranks.wait()
    display = Display(console, engine.steps)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = TrainState()
        checkpoint = usable_checkpoint(run.checkpoints, display.note, ranks=ranks)
        given = checkpoint is not None or run.initial.exists()
        model = task.build(None if given or ranks.mesh is not None else engine.seed)
        if dtype == torch.float64:
            model.double()
        divide_(model, ranks, reshard=engine.reshard)  # before weights are put in: no rank needs room for all of them
        model.to(device)
        if checkpoint is not None:
            load_model(checkpoint, model)
        elif given:
            load_weights([run.initial], model)
        elif ranks.mesh is not None:
            initialize_(model, engine.seed)
        optimizer = build_optimizer(model, optim)
        average = WeightAverage(model, engine.ema_decay)
        if checkpoint is not None:
            state = load_training(checkpoint, model, optimizer)
            average.load_state_dict(load_average(checkpoint, average.state_dict()))
            display.note(f"continuing from step {state.step}")
            for words in changes(earlier, facts, device):
                display.note(words)
        order = Order(task.num_examples, engine.seed, task.fingerprint)
        sink = open_sink(log, run, state.step, display.note) if log and ranks.is_main else None
        told = None if sink is None else sink.write
        metrics = MetricsFile(run.metrics_file, keep_through=state.step, ranks=ranks, sink=told, warn=display.note)
        if metrics.last_step == state.step:
            state.row = metrics.last_row  # complete, with its validation
        clipping = optim.make_clipping()
        if state.clipping:
            clipping.load_state_dict(state.clipping)
        flops = task.flops_per_example(model) * engine.batch_size
        parts = _Parts(task, model, optimizer, clipping, order, engine, optim, dtype, flops, peak, ranks)
        sample = ""
        saved = state.step
        last_step = engine.steps if stop_at is None else min(stop_at, engine.steps)

        def save() -> None:
            nonlocal saved
            saver.save(model, optimizer, state, average.state_dict())
            saved = state.step

        telling = contextlib.nullcontext() if sink is None else contextlib.closing(sink)
        saver = Saver(run.checkpoints, ranks, background=engine.background_save)
        with telling, saver, stop_requests(display.note) as asked_here, display.live(state.step):

            def should_stop() -> bool:
                return ranks.any(asked_here())  # all stop at the same place

            while True:
                # Finish the last step taken: what it owes is validation, a sample and its line of metrics.
                if state.step > metrics.last_step:
                    due = due_after(state.step, engine)
                    if due.evaluate:
                        with _in_use(model, average, dtype, ranks):
                            values = task.evaluate(model, "validation", should_stop, ranks)
                        if values is None:
                            break
                        state.row |= values
                    if due.sample:
                        using = _in_use(model, average, dtype, ranks, whole=task.samples_whole)
                        with _samples_folder(run, ranks) as folder, using:
                            sample = task.sample(model, folder / f"step-{state.step:06d}", engine.seed, should_stop)
                    metrics.append(state.row)
                    display.step(state.row)
                    if saved == state.step and ranks.is_main:
                        prune_checkpoints(run.checkpoints, engine.keep_last, run.best_step())
                if state.step >= last_step or should_stop():
                    break

                _take_step(parts, state)
                if not state.skipped_in_a_row:
                    average.update(state.step - 1)
                elif state.skipped_in_a_row > engine.max_skips:
                    raise TrainingError(
                        f"{state.skipped_in_a_row} steps in a row were not finite (engine.max_skips = "
                        f"{engine.max_skips}); the last checkpoint is intact. Lower optim.lr or lengthen the warm-up"
                    )
                if (state.row.get("spike") or 0.0) > SPIKE:
                    display.note(f"step {state.step}: the loss is {state.row['spike']:.0f} sigma above the last steps'")
                # Save first: whatever follows may fail.
                if should_stop() or due_after(state.step, engine).save:
                    save()
            if saved != state.step:
                save()
        metrics.close()

    finished = state.step >= engine.steps and metrics.last_step == state.step
    memory = peak_memory_bytes(device)
    if ranks.is_main:
        used = {"peak_memory_mb": None if memory is None else round(memory / 2**20)}
        run.record_machine(facts | _rate(peak) | used)
        run.record(status="finished" if finished else "stopped", steps=state.step)
    return Outcome(finished, state.step, metrics.last_step, state.row, sample, memory)


def _rate(peak: Peak | None) -> dict[str, float]:
    return {} if peak is None else {"matmul_gflops": round(peak.flops_per_second / 1e9, 1)}


class _Parts(NamedTuple):
    """What every step uses and no step replaces."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
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


def _take_step(parts: _Parts, state: TrainState) -> None:
    """Advance model, optimizer and state by one step, and fill ``state.row`` with its metrics."""
    task, model, optimizer, clipping, order, engine, optim, dtype, flops, peak, ranks = parts
    started = time.perf_counter()
    device = next(model.parameters()).device
    examples = order.examples(state.step * engine.batch_size, engine.batch_size)
    # Dropout and noise are a function of the step, so that no generator needs saving; ranks draw their own.
    noise = int(Stream(engine.seed, "step", state.step, ranks.rank).words(0, 1)[0]) >> 1
    torch.manual_seed(noise)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    own = examples[ranks.rank :: ranks.world]
    size = engine.micro_batch_size or len(own)
    batch: Batch = {}
    for start in range(0, len(own), size):
        batch = task.batch(own[start : start + size])
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(device, dtype, cache=False):
            loss = task.loss(model, batch)
        sum_over_replicas(model, now=start + size >= len(own))
        (loss.total if loss.regularizer is None else loss.total + loss.regularizer).backward()
        total += float(loss.total.detach())
        count += loss.count
    total, count = ranks.sum(total, count)
    # Sums over elements were differentiated: one division makes the mean, however the batch was cut and shared out.
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1.0 / count)

    before_optimizer = time.perf_counter()
    clip = clipping(model)
    norm = float(clip.norm)
    finite = math.isfinite(total) and math.isfinite(norm)
    if not finite and engine.on_nonfinite == "stop":
        raise TrainingError(
            f"step {state.step + 1}: loss {total / count:.4g}, gradient norm {norm:.4g} - not finite; nothing was "
            f"updated. Its examples were {', '.join(map(str, examples.tolist()))}. "
            "The last checkpoint is intact; start a new run with a lower optim.lr or a longer warm-up, "
            "or leave such steps out with engine.on_nonfinite=skip"
        )
    lr = optim.lr * lr_factor(state.step, engine.steps, optim)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["momentum"] = momentum_at(state.step, engine.steps, optim)
    diagnosed = finite and ranks.world == 1 and every(engine.diagnose_every, state.step + 1)
    before = snapshot(optimizer) if diagnosed else None
    if finite:
        optimizer.step()
    stats: dict[str, Any] = {}
    after_optimizer = time.perf_counter()
    if before is not None:  # before anything else changes the weights
        observed = None
        if size >= len(own):
            observed = (_loss_again(parts, batch, noise) - total) / count
        # Spectral clipping has no one factor: its diagnosis is that of the clipped gradient.
        scale = 1.0 if optim.clip == "spectral" else float(clip.scale)
        found = diagnose(model, optimizer, before, clip_scale=scale, observed_change=observed)
        stats = {**found.metrics, "layer_share": found.layers, "spectra": found.spectra}
    diagnosing = time.perf_counter() - after_optimizer
    if optim.cap:
        stats["cap_factor"] = float(optimizer.cap_factor)  # type: ignore[attr-defined]
    stats |= task.after_step(model, (state.step + 1) / engine.steps)
    ended = time.perf_counter() - diagnosing

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
    state.seconds += ended - started
    if state.step % engine.load_every and state.step != 1:
        for name in ("expert_load", "expert_bias"):
            stats.pop(name, None)
    state.row = {
        "step": state.step,
        "loss": total / count,
        **task.step_metrics(total / count),
        "lr": lr,
        "grad_norm": norm,
        "clip_fraction": state.clipped / state.step,
        "clip_threshold": float(clip.threshold),
        "tokens": state.counted,
        "seconds": state.seconds,
        "tokens_per_second": count / (ended - started),
        "optimizer_share": (ended - before_optimizer) / (ended - started),
        "mfu": peak.reached_by(flops / ranks.world, ended - started) if peak else None,
        **stats,
    }


@torch.no_grad()
def _loss_again(parts: _Parts, batch: Batch, noise: int) -> float:
    """Summed loss of the batch that was just trained on, with the same noise, and without counting as training."""
    torch.manual_seed(noise)
    parts.model.eval()
    try:
        with autocast(next(parts.model.parameters()).device, parts.dtype):
            return float(parts.task.loss(parts.model, batch).total)
    finally:
        parts.model.train()


@contextlib.contextmanager
def _in_use(
    model: nn.Module, average: WeightAverage, dtype: torch.dtype, ranks: Ranks, *, whole: bool = False
) -> Iterator[None]:
    """The model as it is validated and sampled: with averaged weights, if there are any."""
    precision = autocast(next(model.parameters()).device, dtype, cache=ranks.mesh is None)
    with average.applied(), put_away(model, whole=whole), precision:
        yield


@contextlib.contextmanager
def _samples_folder(run: Run, ranks: Ranks) -> Iterator[Path]:
    """Where a sample goes: every rank makes it, since all must be at work, and that of the main one is kept."""
    if ranks.is_main:
        yield run.samples
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
