"""Figures over steps: loss, bits per byte, learning rate, gradient norm, speed. None where the data is missing."""

from __future__ import annotations

import math

import numpy as np

from quintic.optim.clip_advice import advice, clip_statistics
from quintic.report.charts import Rule, Series, line_chart, smooth, smoothing
from quintic.report.figure import Figure
from quintic.report.records import Floats, Records
from quintic.report.words import significant

__all__ = ["bits_figure", "gradient_figure", "loss_figure", "rate_figure", "speed_figure"]


_FEW = 20
"""Norms that are too few to say where a threshold should be."""
_SPIKE = 30
"""Times the height of the usual values that a value stands above them to be a spike."""


def bits_figure(records: Records) -> Figure | None:
    """Bits per byte or per dimension of training and validation."""
    bits = records.bits
    if bits is None:
        return None
    alike = "whatever the tokenizer" if bits.data == "text" else "whatever the model"
    return _quality(
        records,
        bits.key,
        title=bits.unit.capitalize(),
        unit="",
        caption=f"Lower is better, {alike}; {bits.raw}. Dots are {bits.data} kept out of training: "
        "if they rise while the line falls, the model learns by heart.",
        wide=True,
    )


def loss_figure(records: Records) -> Figure | None:
    """Loss of training and validation."""
    first = records.bits is None  # nothing says it better
    return _quality(
        records,
        "loss",
        title="Loss",
        unit=records.loss_unit or "loss",
        caption="What the optimizer lowers"
        + ("; if the dots, validation, rise while the line falls, the model learns by heart." if first else "."),
        wide=first,
    )


def _quality(records: Records, key: str, *, title: str, unit: str, caption: str, wide: bool) -> Figure | None:
    steps, values = records.column(key)
    val_steps, val_values = records.column(f"val_{key}")
    trained, validated = np.isfinite(values).any(), np.isfinite(val_values).any()
    if not (trained or validated):
        return None
    series: list[Series] = []
    top = None
    if trained:
        half = smoothing(len(steps))
        means = smooth(values, half)
        series += _raw_and_mean(steps, values, means, half)
        top, spiked = _settled_top(steps, means, val_values)
        start = float(values[np.isfinite(values)][0])
        if start > top:
            caption += f" It starts at {significant(start)}."
        if spiked:
            caption += f" A spike to {significant(float(values[np.isfinite(values)].max()))} runs out of the frame."
        if lost := int((~np.isfinite(values)).sum()):
            caption += f" {lost:,} of {len(values):,} steps have no finite value and are left out."
    if validated:
        series.append(Series("validation", val_steps, val_values, "dots"))
    last = records.last(f"val_{key}")
    label = f"{title} over {records.step} steps" + (f"; validation ends at {significant(last, 4)}" if last else "")
    return Figure(title, line_chart(series, unit=unit, label=label, top=top, tall=wide), caption, wide)


def _raw_and_mean(steps: Floats, values: Floats, means: Floats, half: int) -> list[Series]:
    """Every step lightly with the mean on top, or the steps alone if they are few."""
    if half == 0:
        return [Series("each step", steps, values)]
    return [Series("each step", steps, values, "raw"), Series(f"mean of {2 * half + 1} steps", steps, means)]


def rate_figure(records: Records) -> Figure | None:
    """Learning rate."""
    steps, values = records.column("lr")
    if not np.isfinite(values).any():
        return None
    chart = line_chart(
        [Series("learning rate", steps, values)],
        unit="",
        label=f"Learning rate over {records.step} steps",
        from_zero=True,
    )
    peak = significant(float(np.nanmax(values)))
    return Figure("Learning rate", chart, f"It peaks at {peak}; look for dips of the loss where it falls.")


def gradient_figure(records: Records) -> Figure | None:
    """Global gradient norm before clipping, and the threshold."""
    steps, values = records.column("grad_norm")
    if not (np.isfinite(values) & (values > 0)).any():
        return None
    optim = records.config.get("optim", {})
    # Only a global norm is measured on this axis; an adaptive threshold moves, and none is none.
    threshold = optim.get("clip_norm") if optim.get("clip", "global") == "global" else None
    rules = []
    caption = ["The norm over all parameters, before clipping; a spike is a batch that surprised the model."]
    if isinstance(threshold, int | float) and 0 < threshold < math.inf:
        rules.append(Rule(f"clipped above {significant(threshold)}", float(threshold)))
        found = clip_statistics(values.tolist(), float(threshold))
        if found.steps >= _FEW or found.nonfinite:
            words = advice(found)
            caption.append(words[0].upper() + words[1:] + ".")
    half = smoothing(len(steps))
    # The mean of logarithms: the middle of the band on a logarithmic axis.
    means = np.exp(smooth(np.log(np.where(values > 0, values, np.nan)), half))
    series = _raw_and_mean(steps, values, means, half)
    label = f"Gradient norm over {records.step} steps, logarithmic"
    chart = line_chart(series, unit="log scale", label=label, rules=rules, log=True)
    return Figure("Gradient norm", chart, " ".join(caption))


def speed_figure(records: Records) -> Figure | None:
    """Throughput of the training steps."""
    steps, values = records.column("tokens_per_second")
    typical = records.median("tokens_per_second")
    if typical is None:
        return None
    half = smoothing(len(steps))
    series = _raw_and_mean(steps, values, smooth(values, half), half)
    chart = line_chart(
        series,
        unit=f"{records.things} per second",
        label=f"{records.things} per second over {records.step} steps; typically {typical:,.0f}",
        from_zero=True,
    )
    caption = [f"A typical step does {typical:,.0f} a second; in a dip something else used the machine."]
    share = records.median("optimizer_share")
    if share is not None:
        caption.append(f"The optimizer takes {share:.0%} of a step.")
    mfu = records.median("mfu")
    if mfu is not None:
        reached = f"{mfu:.0%}" if mfu >= 0.01 else "less than 1%"
        caption.append(f"The model uses {reached} of the machine's measured matrix-product peak (MFU).")
    return Figure("Speed", chart, " ".join(caption))


def _settled_top(steps: Floats, means: Floats, validation: Floats) -> tuple[float, bool]:
    """Highest value after the first 2 % of the steps, in which a loss falls so far that it would flatten the rest.

    Nor does a spike count that would flatten the rest and lasts for less than a tenth of the steps; and whether there
    is one.
    """
    after = steps >= steps[0] + 0.02 * (steps[-1] - steps[0])
    values = np.concatenate([means[after], validation])
    values = values[np.isfinite(values)]
    if not len(values):
        return math.inf, False
    low, usual, high = np.quantile(values, [0.0, 0.9, 1.0])
    limit = usual + _SPIKE * (usual - low)
    spiked = bool(high > limit > low)
    return float(values[values <= limit].max() if spiked else high), spiked
