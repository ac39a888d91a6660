"""The training loop, for every task. Read it top to bottom: it is the story of a run.

config -> data -> task and model -> (loss, stats) -> optimizer -> metrics -> checkpoint. A step is a pure function of
the state before it: the examples of step s are positions s B to (s + 1) B of an order fixed by (data, seed), and so is
the noise it draws, so a checkpoint needs to remember only s. Order of events after a step: save, then validate (and
save what no period has saved and is better than all before), then sample, then write the step's metrics; a crash in any
of them loses nothing that was learned.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from quintic.core import QuinticError
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
from quintic.engine.lost import refuse_lost
from quintic.engine.metrics import MetricsFile
from quintic.engine.periods import due_after
from quintic.engine.plan import check_batch
from quintic.engine.progress import Display
from quintic.engine.run import Run
from quintic.engine.saving import Saver
from quintic.engine.shard import divide_, put_away
from quintic.engine.signals import stop_requests
from quintic.engine.sinks import open_sink
from quintic.engine.spikes import SPIKE
from quintic.engine.step import StepParts, TrainingError, take_step
from quintic.engine.task import Task
from quintic.engine.utilization import Peak
from quintic.optim import OptimConfig, build_optimizer
from quintic.optim.lr import decay_start

__all__ = ["Outcome", "TrainingError", "train"]


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
        CheckpointError: Every checkpoint is damaged, gone or does not fit, or another process trains this run.
        ConfigError: The batch does not divide among the ranks.
    """
    engine: EngineConfig = settings["engine"]
    check_batch(engine.batch_size, ranks.world)
    display = Display(console, engine.steps)
    stable = decay_start(engine.steps, settings["optim"]) if engine.keep_stable else None
    with contextlib.ExitStack() as stack:
        asked_here = stack.enter_context(stop_requests(display.note))  # one that comes while a model is loaded, too
        ranks.together(lambda: stack.enter_context(run.locked()) if ranks.is_main else None)
        try:
            ranks.together(lambda: refuse_lost(run, engine, stable) if ranks.is_main else None)
            return _train(task, settings, run, display, asked_here, stable, quiet_peak, stop_at, ranks, log)
        except Exception as error:
            if ranks.is_main:  # the disk may be what failed
                with contextlib.suppress(OSError, QuinticError):
                    run.record(status="failed", error=str(error) or type(error).__name__)
            raise


def _train(
    task: Task,
    settings: Settings,
    run: Run,
    display: Display,
    asked_here: Callable[[], bool],
    stable: int | None,
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
        run.record(status="running", error=None)
        run.checkpoints.mkdir(exist_ok=True)
        clear_leftovers(run.checkpoints)
        run.samples.mkdir(exist_ok=True)
        task.save_with(run.folder)
    ranks.wait()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = TrainState()
        checkpoint = usable_checkpoint(run.checkpoints, display.note, ranks=ranks)
        model = _built(task, engine, run, checkpoint, device, dtype, ranks)
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
        parts = StepParts(task, model, optimizer, clipping, order, engine, optim, dtype, flops, peak, ranks)
        sample = ""
        saved = state.step
        last_step = engine.steps if stop_at is None else min(stop_at, engine.steps)

        def save() -> None:
            nonlocal saved
            saver.save(model, optimizer, state, average.state_dict())
            saved = state.step

        telling = contextlib.nullcontext() if sink is None else contextlib.closing(sink)
        saver = Saver(run.checkpoints, ranks, background=engine.background_save)
        with telling, saver, display.live(state.step):

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
                        if saved != state.step and ranks.any(metrics.improves(state.row)):
                            save()
                    if due.sample:
                        using = _in_use(model, average, dtype, ranks, whole=task.samples_whole)
                        with _samples_folder(run, ranks) as folder, using:
                            sample = task.sample(model, folder / f"step-{state.step:06d}", engine.seed, should_stop)
                    metrics.append(state.row)
                    display.step(state.row)
                    if saved == state.step and ranks.is_main:
                        prune_checkpoints(run.checkpoints, engine.keep_last, (run.best_step(), stable))
                if state.step >= last_step or should_stop():
                    break

                take_step(parts, state)
                if not state.skipped_in_a_row:
                    average.update(state.step - 1)
                elif state.skipped_in_a_row > engine.max_skips:
                    raise TrainingError(
                        f"{state.skipped_in_a_row} steps in a row were not finite (engine.max_skips = "
                        f"{engine.max_skips}); what was saved before is intact. Lower optim.lr or lengthen the warm-up"
                    )
                if (state.row.get("spike") or 0.0) > SPIKE:
                    display.note(f"step {state.step}: the loss is {state.row['spike']:.0f} sigma above the last steps'")
                # Save first: whatever follows may fail.
                if should_stop() or due_after(state.step, engine).save or state.step == stable:
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


def _built(
    task: Task,
    engine: EngineConfig,
    run: Run,
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> nn.Module:
    """The model where it is trained, with the weights of the checkpoint, of the run's start, or of the seed."""
    given = checkpoint is not None or run.initial.exists()
    model = task.build(engine.seed, initialize=not given and ranks.mesh is None)
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
    return model


def _rate(peak: Peak | None) -> dict[str, float]:
    return {} if peak is None else {"matmul_gflops": round(peak.flops_per_second / 1e9, 1)}


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
