"""One page about a race: who won by how much, how each arm was tuned, and the curves of the best runs."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from quintic.core import CheckpointError
from quintic.core.files import atomic_write
from quintic.engine.metrics import read_metrics
from quintic.report.charts import Series, line_chart
from quintic.report.html import document

__all__ = ["write_race_report"]


def write_race_report(folder: Path) -> Path:
    """Write ``race.html`` beside ``race.json``.

    Args:
        folder: The folder of a finished race.

    Returns:
        The page's path.

    Raises:
        CheckpointError: The folder holds no finished race.
    """
    source = folder / "race.json"
    if not source.is_file():
        raise CheckpointError(f"{folder} holds no finished race (no race.json); run quintic race with --out {folder}")
    race = json.loads(source.read_text(encoding="utf-8"))
    path = folder / "race.html"
    atomic_write(path, _page(folder, race))
    return path


def _page(folder: Path, race: dict[str, Any]) -> str:
    matches = "".join(
        f"<p>{escape(m['winner'])} reaches the loss of {escape(m['against'])} in <b>{m['step_ratio']:.2f}</b> of its "
        f"steps and <b>{m['time_ratio']:.2f}</b> of its time, measured with shorter schedules.</p>"
        for m in race["matches"]
    )
    rows = "".join(
        f"<tr><td>{escape(arm['name'])}</td><td>{arm['mean']:.4f} &plusmn; {arm['spread']:.4f}</td>"
        f"<td>{arm['best_lr']:g}{'' if arm['interior'] else ' (edge of the grid)'}</td>"
        f"<td>{1000 * arm['seconds_per_step']:.1f}</td><td>{escape(' '.join(arm['overrides']))}</td></tr>"
        for arm in race["arms"]
    )
    sweeps = "".join(f"<tr><td>{escape(arm['name'])}</td><td>{_sweep(arm['sweep'])}</td></tr>" for arm in race["arms"])
    main = f"""<header><p class="kind">Race over {race["steps"]:,} steps</p>
<h1>{escape(race["winner"])} has the lowest loss</h1>
{matches}</header>
<section><h2>Result</h2>
<table><tr><th>arm</th><th>validation loss, mean and deviation over seeds</th><th>best learning rate</th>
<th>ms a step</th><th>settings</th></tr>{rows}</table></section>
<section><h2>Curves</h2>{_curves(folder, race)}</section>
<section><h2>Tuning</h2><p>Loss of the first seed by learning rate; the grid grew until the best one was inside.</p>
<table>{sweeps}</table></section>"""
    return document(f"Race: {folder.name}", main)


def _sweep(losses: dict[str, float]) -> str:
    by_rate = sorted((float(lr), loss) for lr, loss in losses.items())
    return ", ".join(f"{lr:g}: {_loss(loss)}" for lr, loss in by_rate)


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _curves(folder: Path, race: dict[str, Any]) -> str:
    series = []
    for arm in race["arms"]:
        run = folder / f"{arm['name']}-lr{arm['best_lr']:g}-seed0-steps{race['steps']}"
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("val_loss") is not None]
        if rows:
            x, y = np.array([(row["step"], row["val_loss"]) for row in rows], dtype=np.float64).T
            series.append(Series(arm["name"], x, y))
    if not series:
        return ""
    return line_chart(
        series, unit="validation loss", label="validation loss over steps, first seed of each arm", tall=True
    )
