"""Singular values of some matrices over the run, and of their last update: what a matrix optimizer works on."""

from __future__ import annotations

from typing import Any

import numpy as np

from quintic.report.charts import Series, line_chart
from quintic.report.figure import Figure
from quintic.report.records import Floats, Records, numbers
from quintic.report.words import significant

__all__ = ["spectra_figure"]

_STEPS = 5  # spectra of the weights that are drawn of one matrix, the first and the last among them


def spectra_figure(records: Records) -> Figure | None:
    """One chart for each recorded matrix: singular values by rank, lighter lines being earlier."""
    rows = [(row["step"], row["spectra"]) for row in records.rows if isinstance(row.get("spectra"), dict)]
    charts = [chart for name in (rows[-1][1] if rows else ()) if (chart := _chart(name, rows))]
    if not charts:
        return None
    caption = (
        "Singular values of some of the matrices, largest first: lines are the weights, lighter when earlier, dots the "
        "last update per unit of learning rate. Muon makes those of an update all alike; where lines fall steeply, few "
        "directions of a matrix do the work."
    )
    many = " many" if len(charts) > 4 else ""
    return Figure("Spectra of the matrices", f'<div class="maps{many}">{"".join(charts)}</div>', caption, wide=True)


def _chart(name: str, rows: list[tuple[int, dict[str, Any]]]) -> str | None:
    """The chart of one matrix; None without a positive singular value."""
    found = [(step, spectrum) for step, spectra in rows if (spectrum := _spectrum(spectra.get(name))) is not None]
    if not found:
        return None
    shown = sorted({round(i * (len(found) - 1) / (_STEPS - 1)) for i in range(_STEPS)})
    series = []
    for place, index in enumerate(shown):
        step, spectrum = found[index]
        ends = index in (0, len(found) - 1)
        strength = 1.0 if len(shown) == 1 else 0.3 + 0.7 * place / (len(shown) - 1)
        label = f"step {step:,}" if ends else ""
        series.append(Series(label, spectrum["rank"], spectrum["weight"], "line", strength))
    last = found[-1][1]
    if "update" in last:
        series.append(Series("update", last["rank"], last["update"], "dots"))
    if not any((s.y[np.isfinite(s.y)] > 0).any() for s in series):
        return None
    n, m = last["shape"].astype(int)
    top = next((float(value) for value in last["weight"] if not np.isnan(value)), None)
    now = "" if top is None else f"; the largest of the weights is {significant(top)} at step {found[-1][0]:,}"
    label = f"Singular values of {name}, {n} by {m}, logarithmic{now}"
    chart = line_chart(series, unit=f"{name}, {n} x {m}", label=label, log=True, x_name="rank")
    return f'<div class="map">{chart}</div>'


def _spectrum(value: Any) -> dict[str, Floats] | None:
    """What was recorded of a matrix; None if that is damaged."""
    if not isinstance(value, dict):
        return None
    found = {key: numbers(value[key], 1) for key in ("shape", "rank", "weight", "update") if value.get(key)}
    whole = {key: values for key, values in found.items() if values is not None}
    if not {"shape", "rank", "weight"} <= whole.keys() or len(whole["shape"]) != 2:
        return None
    if not np.isfinite(whole["shape"]).all() or len({len(whole[key]) for key in whole if key != "shape"}) > 1:
        return None
    return whole
