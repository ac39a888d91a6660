"""One page about a race: who won by how much, how each arm was tuned, and the curves of the best runs."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from quintic.core import CheckpointError
from quintic.core.files import atomic_write
from quintic.engine.metrics import read_metrics
from quintic.report.charts import Series, line_chart
from quintic.report.figure import Figure
from quintic.report.html import document, header, number_table, section
from quintic.report.machine import machine_table
from quintic.report.records import json_object, loss_unit
from quintic.report.words import by_seed, finite

__all__ = ["write_race_report"]


def write_race_report(folder: Path) -> Path:
    """Write ``race.html`` beside ``race.json``.

    Args:
        folder: The folder of a finished race.

    Returns:
        The page's path.

    Raises:
        CheckpointError: The folder holds no finished race, or its record is damaged.
    """
    source = folder / "race.json"
    if not source.is_file():
        raise CheckpointError(f"{folder} holds no finished race (no race.json); run quintic race with --out {folder}")
    path, remedy = folder / "race.html", f"repeat the race with --out {folder}"
    try:
        page = _page(folder, json_object(source, remedy))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{source} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    atomic_write(path, page)
    return path


def _page(folder: Path, race: dict[str, Any]) -> str:
    arms = sorted(race["arms"], key=lambda arm: arm["mean"])
    seeds = len(arms[0]["losses"])
    matches = " ".join(
        f"{escape(m['winner'])} reaches the loss of {escape(m['against'])} in <b>{m['step_ratio']:.2f}</b> of its "
        f"steps{by_seed(m.get('step_ratios', []))} and <b>{m['time_ratio']:.2f}</b> of its time, "
        "measured with shorter schedules."
        for m in race["matches"]
    )
    lead = f"{matches} Every arm had the same data and steps, and learning rates of its own."
    cards = [
        (finite(arm["mean"], 4, "diverged"), f"validation loss of {arm['name']}", _spread(arm, seeds)) for arm in arms
    ]
    result = f"{race['winner']} has the lowest loss" if math.isfinite(arms[0]["mean"]) else "Every arm diverged"
    main = [
        header(f"Race over {race['steps']:,} steps", result, lead.strip(), cards),
        section("Curves", [_curves(folder, race)]),
        f"<section><h2>Arms</h2>{_arms(arms)}</section>",
        f"<section><h2>Tuning</h2>{_sweeps(arms)}"
        '<p class="note">Validation loss of the first seed by learning rate. The grid grows by factors of two until '
        "the best rate has a worse one on either side.</p></section>",
    ]
    if machine := machine_table(json_object(_best_run(folder, race, arms[0]) / "machine.json")):
        main.append(f"<section><h2>Made of</h2>{machine}</section>")
    return document(f"Race: {folder.absolute().name}", "\n".join(main), folder.absolute().name)


def _spread(arm: dict[str, Any], seeds: int) -> str:
    if not math.isfinite(arm["mean"]):
        return f"{sum(not math.isfinite(loss) for loss in arm['losses'])} of {seeds} seeds without a finite loss"
    return f"deviation {arm['spread']:.4f} over {seeds} seeds" if seeds > 1 else "one seed"


def _arms(arms: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{escape(arm['name'])}<small>{escape(' '.join(arm['overrides']))}</small>",
            [
                finite(arm["mean"], 4, "diverged"),
                finite(arm["spread"], 4) if len(arm["losses"]) > 1 else "one seed",
                f"{arm['best_lr']:g}" + ("" if arm["interior"] else "<small>edge of the grid</small>"),
                finite(1000 * arm["seconds_per_step"], 1),
            ],
        )
        for arm in arms
    ]
    return number_table(["mean loss", "deviation", "best rate", "ms a step"], rows)


def _sweeps(arms: list[dict[str, Any]]) -> str:
    """Loss by arm and learning rate."""
    rates = sorted({float(lr) for arm in arms for lr in arm["sweep"]})
    rows = []
    for arm in arms:
        losses = {float(lr): loss for lr, loss in arm["sweep"].items()}
        cells = []
        for lr in rates:
            text = "" if lr not in losses else finite(losses[lr], 4, "diverged")
            cells.append(f'<span class="best">{text}</span>' if lr == arm["best_lr"] else text)
        rows.append((escape(arm["name"]), cells))
    return number_table([f"{lr:g}" for lr in rates], rows)


def _curves(folder: Path, race: dict[str, Any]) -> Figure | None:
    series = []
    for hue, arm in enumerate(race["arms"]):
        rows = read_metrics(_best_run(folder, race, arm) / "metrics.jsonl")
        rows = [row for row in rows if row.get("val_loss") is not None]
        if rows:
            x, y = np.array([(row["step"], row["val_loss"]) for row in rows], dtype=np.float64).T
            series.append(Series(arm["name"], x, y, hue=hue))
    if not series:
        return None
    ends = ", ".join(f"{s.name} ends at {s.y[-1]:.4f}" for s in series)
    label = f"Validation loss over {race['steps']} steps: {ends}"
    caption = (
        "The first seed of every arm at its best learning rate. Only the ends compare: in mid-schedule a curve "
        "depends on how its learning rate falls."
    )
    chart = line_chart(series, unit=loss_unit(race.get("task", "")), label=label, tall=True)
    return Figure("Validation loss", chart, caption, wide=True)


def _best_run(folder: Path, race: dict[str, Any], arm: dict[str, Any]) -> Path:
    """The run of an arm's first seed at its best rate."""
    return folder / f"{arm['name']}-lr{arm['best_lr']:g}-seed0-steps{race['steps']}"
