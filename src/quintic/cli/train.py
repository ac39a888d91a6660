"""``quintic train``: from text to a trained model, a report and a first sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.plan import memory_advice
from quintic.cli.printing import say, visible
from quintic.cli.wiring import build_settings, build_task, kind_of, section_types, split_arguments

if TYPE_CHECKING:
    from quintic.core.ranks import Ranks
    from quintic.engine import Run, Settings, Task

__all__ = ["run_training", "train"]


def train(
    *arguments: str | Path,
    task: str = "lm",
    size: str = "laptop",
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    start: Annotated[Path | None, Parameter(name="--from")] = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    tracker: str | None = None,
    settings: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a model on text or images; without a path, on the embedded corpus (Moby Dick) or drawn shapes.

    Parameters
    ----------
    arguments
        Files and folders (.txt, .md, .jsonl, each also .gz; pictures; folders are searched), and settings as
        section.field=value. See --settings for all of them.
    task
        What to train: lm (text), tarflow or ddpm (images).
    size
        Preset that fills every setting: tiny or laptop; for text also small, medium or moonlight-16b-a3b.
    out
        Run folder to create; it must not hold a run yet. Default: runs/NAME-SIZE, NAME being that of the data.
    start
        Start from the weights (and take shape and tokenizer) of this run or exported folder; a lower learning rate
        than from scratch, such as optim.lr=0.002, keeps what was learned.
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        Precision of matrix products: auto, float32, bfloat16 or float64.
    seed
        Seed of the initial weights, the data order and the samples.
    tracker
        Send the metrics to tensorboard (files in the run folder), trackio or wandb too; each is an extra.
    settings
        List every setting with its meaning and its value for this size, and exit.

    Examples
    --------
    quintic train my_notes/ --size laptop
    quintic train book.txt --out runs/book optim.lr=0.01 lm.num_experts=32
    quintic train --task tarflow --size tiny pictures/
    quintic train book.txt --from runs/book --out runs/more optim.lr=0.002
    quintic train book.txt --tracker tensorboard
    quintic train --settings
    torchrun --nproc-per-node 8 -m quintic train book.txt
    """
    paths, overrides = split_arguments(arguments)
    for name, value in (("device", device), ("dtype", dtype), ("seed", seed)):
        if value is not None:
            overrides.append(f"engine.{name}={value}")
    resolved = build_settings(task, size, overrides)
    if settings:
        _list_settings(Console(), task, resolved)
        return

    from quintic.core.machine import pick_device, pick_dtype
    from quintic.engine.mesh import join_ranks
    from quintic.engine.sinks import check_sink

    if tracker is not None:
        check_sink(tracker)
    engine = resolved["engine"]
    where = pick_device(engine.device)
    chosen = pick_dtype(engine.dtype, where)
    if engine.dtype == "auto":
        # Written down, so that a resume computes in the same precision.
        name = str(chosen).removeprefix("torch.")
        resolved = resolved.derive("engine.dtype", name, f"fastest safe one on {where.type} here")
    folder = _free_folder(_title(task, paths), size) if out is None else out
    with join_ranks(where, engine.shards) as ranks:
        _new_run(task, size, paths, resolved, folder, start, ranks, tracker)


def _new_run(
    task: str,
    size: str,
    paths: list[Path],
    settings: Settings,
    folder: Path,
    start: Path | None,
    ranks: Ranks,
    tracker: str | None,
) -> None:
    """Prepare data and folder, say what will happen, and train."""
    from quintic.cli.origin import open_origin
    from quintic.engine import Run
    from quintic.engine.checkpoint import check_fit
    from quintic.engine.plan import check_batch

    console = Console(quiet=not ranks.is_main)
    Run.refuse_existing(folder)
    check_batch(settings["engine"].batch_size, ranks.world)
    origin = None if start is None else open_origin(start, task)
    if origin is not None:
        settings = origin.settings(task, settings)
    with ranks.main_first(), console.status(kind_of(task).READING) as status:
        made, settings, warnings = build_task(task, paths, settings, status.update)
    for warning in warnings:
        say(f"warning: {warning}", console=console, style="yellow")
    lines, facts = made.describe()
    for line in lines:
        say(f"  {line}", console=console)
    if ranks.world > 1:
        say(f"  {ranks.world} ranks, {settings['engine'].shards or ranks.world} shards", console=console)
    _print_optimizer(console, made, settings)
    _print_settings(console, settings)
    header = {
        "task": task,
        "size": size,
        "paths": [str(path.absolute()) for path in paths],
        "fingerprint": made.fingerprint,
        **({} if start is None else {"from": str(start.absolute())}),
    }
    if origin is not None:
        shapes = {name: tensor.shape for name, tensor in origin.weights.items()}
        check_fit(shapes, kind_of(task).build(task, settings), str(start))

    def create() -> None:
        run = Run.create(folder, settings, header, None if origin is None else origin.weights)
        run.record(task=task, size=size, title=_title(task, paths), seed=settings["engine"].seed, **facts)

    ranks.wait()  # all have seen that the folder is free
    ranks.together(lambda: create() if ranks.is_main else None)
    say(f"run folder: {folder}", console=console)
    run_training(console, made, settings, Run(folder), ranks, tracker)


def run_training(
    console: Console, task: Task, settings: Settings, run: Run, ranks: Ranks, tracker: str | None = None
) -> None:
    """Train, write the report and say how it ended."""
    from quintic.engine.loop import train as train_loop
    from quintic.report import write_report

    kind = kind_of(task.name)
    if advice := memory_advice(task, settings, ranks.world):
        say(f"warning: {advice[0]} {'; '.join(advice[1:])}", console=console, style="yellow")
    outcome = train_loop(task, settings, run, console, ranks=ranks, log=tracker or "")
    report = write_report(run.folder) if outcome.recorded and ranks.is_main else None

    if outcome.sample:
        shown = visible(outcome.sample) if console.is_terminal else outcome.sample
        say(f"\nsample:\n{shown}\n", console=console)
    if outcome.finished:
        steps = f"{outcome.step} step" + "s" * (outcome.step != 1)
        say(f"finished {steps}: {_final_words(outcome.row, kind.UNIT, run.facts())}", console=console)
    else:
        say(f"stopped at step {outcome.step}; continue with: quintic resume {run.folder}", console=console)
    if outcome.peak_memory is not None:
        say(f"peak memory: {outcome.peak_memory / 2**20:,.0f} MiB", console=console)
    if report is not None:
        say(f"report: {report}", console=console)
    if outcome.finished:
        say(f"next: {kind.NEXT.format(run=run.folder)}", console=console)


def _final_words(row: dict[str, Any], unit: str, facts: dict[str, Any]) -> str:
    if "val_loss" not in row:  # no validation split was asked for
        return f"training loss {row['loss']:.4f}{unit}"
    bits = f", {row['val_bits_per_byte']:.4f} bits per byte" if "val_bits_per_byte" in row else ""
    if bits and (size := facts.get("data", {}).get("validation", {}).get("bytes")):
        bits += f" ({size:,} bytes)"
    return f"validation loss {row['val_loss']:.4f}{unit}{bits}"


def _free_folder(title: str, size: str) -> Path:
    """runs/NAME-SIZE, or with a number behind if that is taken."""
    base = Path("runs") / f"{title.lower().replace(' ', '-')}-{size}"
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _title(task: str, paths: list[Path]) -> str:
    """What the data is called."""
    if not paths:
        return kind_of(task).EMBEDDED
    return paths[0].absolute().name.split(".")[0] or "data"


def _print_optimizer(console: Console, task: Task, settings: Settings) -> None:
    """What is trained by which algorithm, in a line; ``quintic roles`` prints the table."""
    import torch

    from quintic.optim import roles

    if settings["optim"].name != "muon":
        say(f"  optimizer: {settings['optim'].name} for every parameter", console=console)
        return
    optim = settings["optim"]
    with torch.device("meta"):
        model = task.build(initialize=False)
        table = roles(model, scale=optim.scale, vectors=optim.vectors, embeddings=optim.embeddings, strict=True)
    muon, adamw = table.parameters_under("muon"), table.parameters_under("adamw")
    say(f"  optimizer: Muon for {muon:,} parameters, AdamW for {adamw:,}; see quintic roles", console=console)


def _print_settings(console: Console, settings: Settings) -> None:
    """Every resolved value, and its source where that is neither default nor preset."""
    console.print("settings:")
    for section, values in settings.sections.items():
        words = []
        for field in dataclasses.fields(values):
            source = settings.sources[f"{section}.{field.name}"]
            shown = f"{field.name}={getattr(values, field.name)}"
            words.append(shown if source == "default" or source.startswith("preset") else f"{shown} ({source})")
        console.print(f"  {section}: " + ", ".join(words), markup=False, highlight=False)


def _list_settings(console: Console, task: str, settings: Settings) -> None:
    from quintic.engine.config import field_help

    for section, kind in section_types(task).items():
        fields = dataclasses.fields(kind)
        table = Table(title=section, title_justify="left", box=None, pad_edge=False)
        table.add_column("setting", no_wrap=True, min_width=max(len(f"{section}.{f.name}") for f in fields))
        table.add_column("value", overflow="fold")
        table.add_column("meaning")
        helps = field_help(kind)
        for field in fields:
            value = getattr(settings[section], field.name)
            table.add_row(f"{section}.{field.name}", str(value), helps.get(field.name, "").replace("``", ""))
        console.print(table)
        console.print()
