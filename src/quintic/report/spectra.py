"""Singular values of some matrices over the run, and of their last update: what a matrix optimizer works on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quintic.report.charts import Series, line_chart
from quintic.report.figure import Figure
from quintic.report.records import Floats, Records
from quintic.report.words import significant

__all__ = ["spectra_figure"]

_STEPS = 5  # spectra of the weights that are drawn of one matrix, the first and the last among them


def spectra_figure(records: Records) -> Figure | None:
    """One chart for each recorded matrix: singular values by rank, lighter lines being earlier."""
    rows = [row for row in records.rows if row.get("spectra")]
    charts = [chart for name in (rows[-1]["spectra"] if rows else ()) if (chart := _chart(name, rows))]
    if not charts:
        return None
    caption = (
        "Singular values of some of the matrices, largest first: lines are the weights, lighter when earlier, dots the "
        "last update per unit of learning rate. Muon makes those of an update all alike; where lines fall steeply, few "
        "directions of a matrix do the work."
    )
    many = " many" if len(charts) > 4 else ""
    return Figure("Spectra of the matrices", f'<div class="maps{many}">{"".join(charts)}</div>', caption, wide=True)


def _chart(name: str, rows: list[dict[str, Any]]) -> str | None:
    """The chart of one matrix; None without a positive singular value."""
    found = [(row["step"], row["spectra"][name]) for row in rows if name in row["spectra"]]
    shown = sorted({round(i * (len(found) - 1) / (_STEPS - 1)) for i in range(_STEPS)})
    series = []
    for place, index in enumerate(shown):
        step, spectrum = found[index]
        ends = index in (0, len(found) - 1)
        strength = 1.0 if len(shown) == 1 else 0.3 + 0.7 * place / (len(shown) - 1)
        label = f"step {step:,}" if ends else ""
        series.append(Series(label, _floats(spectrum["rank"]), _floats(spectrum["weight"]), "line", strength))
    last = found[-1][1]
    if last.get("update"):
        series.append(Series("update", _floats(last["rank"]), _floats(last["update"]), "dots"))
    if not any((s.y[np.isfinite(s.y)] > 0).any() for s in series):
        return None
    n, m = last["shape"]
    top = next((value for value in last["weight"] if value is not None), None)
    now = "" if top is None else f"; the largest of the weights is {significant(top)} at step {found[-1][0]:,}"
    label = f"Singular values of {name}, {n} by {m}, logarithmic{now}"
    chart = line_chart(series, unit=f"{name}, {n} x {m}", label=label, log=True, x_name="rank")
    return f'<div class="map">{chart}</div>'


def _floats(values: list[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
