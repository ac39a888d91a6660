"""Figures of a mixture of experts: how evenly the tokens are spread, and over which experts.

The heat map shows log2(share * E) of each expert, E experts in a layer: 0 is the uniform share, +1 twice as much,
-1 half. It is a small PNG inside the page whose pixels differ in opacity only: the uniform share is transparent, so
one picture suits light and dark pages.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quintic.report.charts import Rule, Series, line_chart, smooth, smoothing
from quintic.report.figure import Figure
from quintic.report.records import Floats, Records, numbers
from quintic.report.words import significant

__all__ = ["LIMIT", "balance_figure", "load_figure", "load_image", "load_over_time"]

LIMIT = 2.0
"""Colours saturate at a quarter and at four times the uniform share."""
_LEVELS = 24
_COLUMNS = 240
_LESS = (28, 126, 196)
_MORE = (221, 107, 32)


def balance_figure(records: Records) -> Figure | None:
    """MaxVio of every MoE layer, with the floor that random routing would reach."""
    layers = records.layers("max_vio")
    if not layers or not any(np.isfinite(values).any() for _, values in layers):
        return None
    half = smoothing(len(layers[0][0]))
    series = [
        Series(
            f"layer {i + 1}" if len(layers) <= 6 or i in (0, len(layers) - 1) else "",
            steps,
            smooth(values, half),
            strength=1.0 if len(layers) == 1 else 0.35 + 0.65 * i / (len(layers) - 1),
        )
        for i, (steps, values) in enumerate(layers)
    ]
    floor = records.last("max_vio_floor")
    # The first steps are far out of balance and the last ones close to chance: only a logarithmic axis shows both.
    log = floor != 0 and all((values[np.isfinite(values)] > 0).all() for _, values in layers)
    caption = ["How much busier the busiest expert is than the mean: 1 is twice the mean, 0 perfect balance."]
    rules = []
    if floor is not None:
        rules.append(Rule("chance", floor))
        caption.append(f"Experts picked at random would reach {significant(floor, 2)}, the dashed line.")
    if half:
        caption.append(f"Means of {2 * half + 1} steps.")
    chart = line_chart(
        series,
        unit="MaxVio, log scale" if log else "MaxVio",
        label=f"MaxVio of {len(layers)} MoE layers over {records.step} steps",
        rules=rules,
        log=log,
        from_zero=True,
    )
    return Figure("Balance of the experts", chart, " ".join(caption), wide=True)


def load_figure(records: Records) -> Figure | None:
    """Heat maps, one per MoE layer: experts by time."""
    found = [(row["step"], load) for row in records.rows if (load := numbers(row.get("expert_load"), 2)) is not None]
    found = [(step, load) for step, load in found if load.size and load.shape == found[-1][1].shape]
    if not found:
        return None
    steps = np.array([step for step, _ in found], dtype=np.float64)
    shares = np.stack([load for _, load in found], axis=1)
    count, _, experts = shares.shape
    maps = [_heat_map(layer, count, steps, shares[layer]) for layer in range(count)]
    scale = (
        '<div class="scale"><span>1/4 or less</span><i></i><span>4 times or more</span>'
        f"<span>uniform, 1/{experts}</span></div>"
    )
    caption = [
        "Every row is an expert, every column a time, every colour its share of the tokens against the uniform share.",
        "No colour is balance; a row that stays blue is an expert that is hardly used.",
    ]
    dead = records.last("dead_experts")
    if dead is not None:
        if dead == 0:
            caption.append("In the last step every expert was used.")
        else:
            caption.append(f"Experts without any token in the last step: {dead:.0f}.")
    body = f'<div class="maps{" many" if count > 6 else ""}">{"".join(maps)}</div>{scale}'
    return Figure("Load of every expert", body, " ".join(caption), wide=True)


def load_over_time(steps: Floats, shares: Floats, columns: int = _COLUMNS) -> Floats:
    """Loads by expert and evenly spaced time.

    Args:
        steps: (records,) increasing.
        shares: (records, experts); a row sums to 1.
        columns: At most so many columns.

    Returns:
        (experts, columns): log2(share * experts), the mean share over the records of a column. A column without a
        record shows the one before. Experts without tokens are -inf.
    """
    columns = min(columns, len(steps))
    edges = np.linspace(steps[0], steps[-1], columns + 1)
    ends = np.searchsorted(steps, edges[1:], side="right")
    starts = np.concatenate([[0], ends[:-1]])
    picked = [
        shares[start:end].mean(0) if end > start else shares[end - 1] for start, end in zip(starts, ends, strict=True)
    ]
    with np.errstate(divide="ignore"):
        return np.log2(np.stack(picked, axis=1) * shares.shape[1])


def load_image(relative: Floats) -> bytes:
    """PNG of log2 relative loads, one pixel each, transparent where 0; NaN too.

    Args:
        relative: (experts, columns), saturated at ``LIMIT`` either way.
    """
    level = np.nan_to_num(np.clip(relative / LIMIT, -1, 1), nan=0.0, posinf=1.0, neginf=-1.0)
    index: NDArray[np.uint8] = (np.rint(level * _LEVELS) + _LEVELS).astype(np.uint8)
    palette: list[int] = []
    alphas: list[int] = []
    for i in range(-_LEVELS, _LEVELS + 1):
        palette += _LESS if i < 0 else _MORE
        alphas.append(round(255 * abs(i) / _LEVELS))
    image = Image.frombytes("P", index.shape[::-1], index.tobytes())
    image.putpalette(palette)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, transparency=bytes(alphas))
    return out.getvalue()


def _heat_map(layer: int, count: int, steps: Floats, shares: Floats) -> str:
    data = base64.b64encode(load_image(load_over_time(steps, shares))).decode()
    experts = shares.shape[1]
    height = min(max(10 * experts, 80), 240)
    name = f"MoE layer {layer + 1}" if count > 1 else "MoE layer"
    alt = f"Load of {experts} experts of {name} over steps {steps[0]:.0f} to {steps[-1]:.0f}"
    return (
        f'<div class="map"><div class="head"><span class="unit">{name}, experts 1 to {experts}</span></div>'
        f'<img style="height:{height}px" alt="{alt}" src="data:image/png;base64,{data}">'
        f'<div class="ends"><span>step {steps[0]:,.0f}</span><span>step {steps[-1]:,.0f}</span></div></div>'
    )
