"""``quintic plan``: what a training run would need, before any machine is rented."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, split_arguments
from quintic.core import CheckpointError, ConfigError

if TYPE_CHECKING:
    from quintic.data.image_task import ImageTask
    from quintic.engine import Settings, Task
    from quintic.engine.plan import Plan

__all__ = ["memory_advice", "plan"]

_BYTES_A_TOKEN = 3
"""Of a text that is as long as the training, to guess its vocabulary by."""


def plan(
    *arguments: str,
    size: str = "laptop",
    ranks: int = 1,
    shards: int = 0,
    memory_gib: float = 0.0,
    tokens: float = 0.0,
    peak_tflops: float = 0.0,
    mfu: float | None = None,
    mfu_of: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Work out what training a language model takes, without allocating it: parameters, memory, traffic, hours.

    Parameters
    ----------
    arguments
        Settings as section.field=value.
    size
        Preset: tiny, laptop, small, medium or moonlight-16b-a3b.
    ranks
        Processes, one per device.
    shards
        Ranks that share one copy of weights and optimizer state; 0 is all of them.
    memory_gib
        Memory of one rank; if it is too little, the plan says what to change.
    tokens
        Tokens to train on, to compute the hours; 0 takes those of the preset's steps.
    peak_tflops
        Peak of one rank's matrix products in TFLOP/s; 0 measures this machine.
    mfu
        Share of the peak that training reaches; 0.4 if nothing is given or measured.
    mfu_of
        Take the share that this run has reached, the median of its steps; twenty are enough.
    as_json
        Print the numbers as JSON.

    Examples
    --------
    quintic plan --size laptop
    quintic plan --size moonlight-16b-a3b --ranks 64 --memory-gib 80
    quintic plan --size medium --tokens 1e10 --peak-tflops 989
    quintic plan --size small --mfu-of runs/a
    quintic plan --size small --json
    """
    paths, overrides = split_arguments(arguments)
    if paths:
        raise ConfigError(f"plan takes settings only, found the path {paths[0]}")
    mfu = _share_of_peak(mfu, mfu_of)
    if ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, found {ranks}")
    for name, value in (
        ("shards", shards),
        ("memory-gib", memory_gib),
        ("tokens", tokens),
        ("peak-tflops", peak_tflops),
    ):
        if not value >= 0:
            raise ConfigError(f"--{name} must be 0 or more, found {value:g}")
    settings = build_settings("lm", size, overrides)

    import torch

    from quintic.core.machine import matmul_peak, pick_device, pick_dtype
    from quintic.report.words import duration

    engine = settings["engine"]
    budget = tokens or float(engine.steps * engine.batch_size * settings["lm"].context)
    settings, notes = _with_vocabulary(settings, budget)
    device = pick_device("auto")
    dtype = pick_dtype(engine.dtype, device)
    found = _plan_of(settings, ranks, shards, 2 if dtype == torch.bfloat16 else 4, "cuda")
    peak = peak_tflops * 1e12 or matmul_peak(device, dtype)
    hours = found.hours(budget, peak, mfu)
    advice = found.advice(memory_gib * 2**30) if memory_gib else []
    if as_json:
        facts = {
            "parameters": found.parameters,
            "bytes_per_rank": found.bytes_per_rank,
            "sent_per_step": found.sent_per_step,
            "muon_overhead": found.muon_overhead,
            "vocabulary": settings["lm"].vocab_size,
            "tokens_per_step": found.tokens_per_step,
            "flops_per_token": found.flops_per_token,
            "tokens": budget,
            "mfu": mfu,
            "hours": hours,
            "advice": advice,
        }
        say(json.dumps(facts))
        return
    _print(found, size)
    say(
        f"{budget:.3g} tokens take {duration(3600 * hours)} at {mfu:.0%} of {peak / 1e12:,.2f} TFLOP/s a rank; "
        "activations are an estimate, and what the communication costs in time depends on the network"
    )
    for line in [*notes, *advice]:
        say(line)


def _print(found: Plan, size: str) -> None:
    from quintic.engine.plan import as_rows

    say(
        f"{size}: {_count(found.ranks, 'rank')}, {_count(found.shards, 'shard')}, "
        f"{_count(found.micro_batch, 'example')} a forward pass"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in as_rows(found):
        table.add_row(*row)
    Console().print(table)


def _share_of_peak(given: float | None, run: Path | None) -> float:
    """The MFU to count with: as given, as a run has reached it, or the usual one."""
    if given is not None and run is not None:
        raise ConfigError("give either --mfu or --mfu-of")
    share = _reached(run) if run is not None else 0.4 if given is None else given
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu must be in (0, 1], found {share}")
    return share


def _with_vocabulary(settings: Settings, tokens: float) -> tuple[Settings, list[str]]:
    """Settings whose vocabulary is that of a text as long as the training, unless it is given; and what was assumed."""
    from quintic.data.tokenizer import vocab_size_for

    if settings.sources["lm.vocab_size"] != "default":
        return settings, []
    vocabulary = -(-(settings["data"].vocab_size or vocab_size_for(int(_BYTES_A_TOKEN * tokens))) // 8) * 8
    note = f"the text decides the vocabulary; {vocabulary:,} tokens assumed, lm.vocab_size=N for another"
    return settings.derive("lm.vocab_size", vocabulary, "assumed"), [note]


def _plan_of(settings: Settings, ranks: int, shards: int, compute_bytes: int, device_type: str) -> Plan:
    """What a language model of these settings needs, its vocabulary known."""
    import torch

    from quintic.cli.language import build
    from quintic.engine.plan import make_plan
    from quintic.lm.cross_entropy import rows_at_a_time
    from quintic.lm.memory import saved_numbers_per_token

    c, engine = settings["lm"], settings["engine"]
    with torch.device("meta"):
        model = build("lm", settings)
    return make_plan(
        model,
        ranks=ranks,
        shards=shards or ranks,
        examples_per_step=engine.batch_size,
        micro_batch=engine.micro_batch_size,
        tokens_per_example=c.context,
        flops_per_token=model.flops_per_token(c.context),
        active=model.num_parameters()[1],
        activation_numbers_per_token=saved_numbers_per_token(c),
        logits=c.vocab_size * rows_at_a_time(c.vocab_size, device_type),
        compute_bytes=compute_bytes,
        optimizer=settings["optim"].name,
        reshard=engine.reshard,
        checkpoint=c.checkpoint,
    )


def _plan_of_images(task: ImageTask, settings: Settings, ranks: int, compute_bytes: int, device_type: str) -> Plan:
    """What a model of images needs in memory; an example is one token here."""
    import torch

    from quintic.engine.plan import make_plan

    engine = settings["engine"]
    with torch.device("meta"):
        model = task.build(initialize=False)
    return make_plan(
        model,
        ranks=ranks,
        shards=engine.shards or ranks,
        examples_per_step=engine.batch_size,
        micro_batch=engine.micro_batch_size,
        tokens_per_example=1,
        flops_per_token=0.0,
        active=sum(p.numel() for p in model.parameters()),
        activation_numbers_per_token=task.numbers_in_memory_per_image(device_type),
        logits=0,
        compute_bytes=compute_bytes,
        optimizer=settings["optim"].name,
        reshard=engine.reshard,
        checkpoint=task.name == "tarflow" and settings["tarflow"].checkpoint,
        task=task.name,
    )


def memory_advice(task: Task, settings: Settings, ranks: int) -> list[str]:
    """What to change if a step needs more memory than is left here; empty if it fits, or if nobody knows."""
    import torch

    from quintic.core.machine import free_memory_bytes, pick_device, pick_dtype
    from quintic.data.image_task import ImageTask

    device = pick_device(settings["engine"].device)
    free = free_memory_bytes(device)
    if free is None:
        return []
    if device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on one machine
    compute_bytes = 2 if pick_dtype(settings["engine"].dtype, device) == torch.bfloat16 else 4
    if isinstance(task, ImageTask):
        return _plan_of_images(task, settings, ranks, compute_bytes, device.type).advice(free)
    return _plan_of(settings, ranks, settings["engine"].shards, compute_bytes, device.type).advice(free)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _reached(run: Path) -> float:
    """Median MFU of a run's steps."""
    from quintic.engine import Run
    from quintic.engine.metrics import iter_metrics

    found = [row["mfu"] for row in iter_metrics(Run.open(run).metrics_file, containing='"mfu"') if row["mfu"]]
    if not found:
        raise CheckpointError(f"{run} has no step whose share of the peak was measured; train it for some steps")
    return median(found)
