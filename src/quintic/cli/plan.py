"""``quintic plan``: what a training run would need, before any machine is rented."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, kind_of, split_arguments
from quintic.core import ConfigError

__all__ = ["plan"]


def plan(
    *arguments: str,
    size: str = "laptop",
    ranks: int = 1,
    shards: int = 0,
    memory_gib: float = 0.0,
    tokens: float = 0.0,
    peak_tflops: float = 0.0,
    mfu: float = 0.4,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Parameters, bytes per rank, communication per step and hours for a language model, without allocating it.

    Parameters
    ----------
    arguments
        Settings as section.field=value.
    size
        Preset.
    ranks
        Processes, one per device.
    shards
        Ranks that share one copy of weights and optimizer state; 0 is all of them.
    memory_gib
        Memory of one rank; says what to change if it is too little.
    tokens
        Tokens to train on, for the hours; 0 takes the preset's steps.
    peak_tflops
        Peak of one rank's matrix products in TFLOP/s; 0 measures this machine.
    mfu
        Share of the peak that training reaches.
    as_json
        Print the numbers as JSON.

    Examples
    --------
    quintic plan --size laptop
    quintic plan --size moonlight-16b-a3b --ranks 64 --memory-gib 80 --tokens 5.7e12 --peak-tflops 989
    quintic plan --size small --json
    """
    paths, overrides = split_arguments(arguments)
    if paths:
        raise ConfigError(f"plan takes settings only, found the path {paths[0]}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu must be in (0, 1], found {mfu}")
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
    from quintic.engine.plan import as_rows, make_plan
    from quintic.lm.memory import saved_numbers_per_token

    c, engine = settings["lm"], settings["engine"]
    with torch.device("meta"):
        model = kind_of("lm").build("lm", settings)
    device = pick_device("auto")
    dtype = pick_dtype(engine.dtype, device)
    found = make_plan(
        model,
        ranks=ranks,
        shards=shards or ranks,
        examples_per_step=engine.batch_size,
        micro_batch=engine.micro_batch_size,
        tokens_per_example=c.context,
        flops_per_token=model.flops_per_token(c.context),
        active=model.num_parameters()[1],
        activation_numbers_per_token=saved_numbers_per_token(c),
        vocab_size=c.vocab_size,
        compute_bytes=2 if dtype == torch.bfloat16 else 4,
        optimizer=settings["optim"].name,
        reshard=engine.reshard,
    )
    peak = peak_tflops * 1e12 or matmul_peak(device, dtype)
    budget = tokens or float(engine.steps * found.tokens_per_step)
    hours = found.hours(budget, peak, mfu)
    advice = found.advice(memory_gib * 2**30) if memory_gib else []
    if as_json:
        print(
            json.dumps(
                {
                    "parameters": found.parameters,
                    "bytes_per_rank": found.bytes_per_rank,
                    "sent_per_step": found.sent_per_step,
                    "muon_overhead": found.muon_overhead,
                    "tokens_per_step": found.tokens_per_step,
                    "flops_per_token": found.flops_per_token,
                    "tokens": budget,
                    "hours": hours,
                    "advice": advice,
                }
            )
        )
        return
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = f"{size}: {ranks} ranks, {shards or ranks} shards, {found.micro_batch} examples a forward pass"
    table.add_column()
    table.add_column(justify="right")
    for row in as_rows(found):
        table.add_row(*row)
    console.print(table)
    say(
        f"{budget:.3g} tokens take {hours:,.1f} hours at {mfu:.0%} of {peak / 1e12:,.2f} TFLOP/s a rank; "
        "activations are an estimate, and what the communication costs in time depends on the network",
        console=console,
    )
    for line in advice:
        say(line, console=console)
