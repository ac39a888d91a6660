"""Line charts as inline SVG that stay sharp, light and readable at any width.

The lines live in an SVG that stretches with the page (viewBox 0..10000 both ways, ``preserveAspectRatio="none"``,
strokes that do not scale); ticks and labels are HTML around it, so their size is the same on a phone and on a desk.
A line of any length is thinned to the lowest and the highest point of each of a few hundred columns: every point
drawn is a recorded one, and no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quintic.report.records import Floats

__all__ = ["Rule", "Series", "line_chart", "linear_ticks", "log_ticks", "smooth", "smoothing", "thin", "tick_labels"]

_SIZE = 10_000  # units of the viewBox: points are placed to 1/10000 of the axis
_COLUMNS = 400


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    """For the legend and the read-out; empty for one line of a crowd."""
    x: Floats
    """Steps, or what else the horizontal axis counts; increasing."""
    y: Floats
    """Values; NaN leaves a gap."""
    kind: Literal["line", "raw", "dots"] = "line"
    """line: strong; raw: thin and light, behind; dots: one mark per point."""
    strength: float = 1.0
    """Opacity of the stroke, to tell lines apart that have an order, such as layers."""
    hue: int = 0
    """Colour and dashes, of a round of six, to tell lines apart that have none."""

    @property
    def style(self) -> str:
        """Its classes in the style sheet."""
        return f"{self.kind} hue{self.hue % 6}" if self.hue % 6 else self.kind


@dataclass(frozen=True)
class Rule:
    """A dashed horizontal line."""

    name: str
    y: float


def line_chart(
    series: Sequence[Series],
    *,
    unit: str,
    label: str,
    rules: Sequence[Rule] = (),
    log: bool = False,
    from_zero: bool = False,
    top: float | None = None,
    tall: bool = False,
    x_name: str = "step",
) -> str:
    """Draw series over steps, or over what else is counted, as HTML.

    Args:
        series: At least one, with at least one finite value among them.
        unit: What the vertical axis measures.
        label: The chart in words, for those who cannot see it.
        rules: Dashed horizontal lines, always in view.
        log: Logarithmic vertical axis; values that are not positive become gaps.
        from_zero: Include 0 in a linear axis.
        top: Upper end of the values in view; what lies above runs out of the frame.
        tall: Taller than usual.
        x_name: What the horizontal axis counts.
    """
    if log:
        series = [replace(s, y=np.where(s.y > 0, s.y, np.nan)) for s in series]
    values = np.concatenate([s.y for s in series] + [np.array([rule.y for rule in rules])])
    values = values[np.isfinite(values)]
    assert len(values), "a chart needs a finite value"
    low, high = float(values.min()), float(values.max())
    if top is not None:
        high = max(low, min(high, top))
    y_ticks = log_ticks(low, high) if log else linear_ticks(min(low, 0.0) if from_zero else low, high, outward=True)
    x_low, x_high = x_range(np.concatenate([s.x for s in series]))
    ticks = linear_ticks(x_low, x_high)
    x_ticks = [tick for tick in ticks if tick.is_integer()] or ticks

    def x_place(x: Floats) -> Floats:
        return (x - x_low) / (x_high - x_low)

    def y_place(y: Floats) -> Floats:
        if log:
            return (np.log(y) - math.log(y_ticks[0])) / math.log(y_ticks[-1] / y_ticks[0])
        return (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    y_at = y_place(np.array(y_ticks))
    parts = [f'<path class="grid" d="{"".join(f"M0 {_down(p)}H{_SIZE}" for p in y_at)}"/>']
    for rule in rules:
        parts.append(f'<path class="rule" d="M0 {_down(float(y_place(np.array(rule.y))))}H{_SIZE}"/>')
    for s in sorted(series, key=lambda s: ("raw", "line", "dots").index(s.kind)):
        x, y = thin(s.x, s.y)
        fade = "" if s.strength == 1.0 else f' stroke-opacity="{s.strength:.2f}"'
        d = _path(x_place(x), y_place(y), joined=s.kind != "dots")
        name = f' data-name="{escape(s.name)}"' if s.name else ""
        lone = " lone" if s.kind != "dots" and np.isfinite(y).sum() == 1 else ""  # a dot as wide as a line is no sight
        parts.append(f'<path class="{s.style}{lone}"{name}{fade} d="{d}"/>')
    svg = (
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
    y_spans = "".join(
        f'<span class="y" style="bottom:{100 * p:.2f}%">{text}</span>'
        for p, text in zip(y_at, tick_labels(y_ticks), strict=True)
    )
    x_spans = "".join(
        f'<span class="x" style="left:{100 * p:.2f}%">{text}</span>'
        for p, text in zip(x_place(np.array(x_ticks)), tick_labels(x_ticks), strict=True)
    )
    frame = (
        f'<div class="frame{" tall" if tall else ""}" data-name="{escape(x_name)}" data-x="{x_low:.12g} {x_high:.12g}" '
        f'data-y="{y_ticks[0]:.12g} {y_ticks[-1]:.12g}"{" data-log" if log else ""}>{svg}{y_spans}{x_spans}</div>'
    )
    return f'<div class="chart">{_head(unit, series, rules)}{frame}<div class="xname">{escape(x_name)}</div></div>'


def smooth(y: Floats, half: int) -> Floats:
    """Mean over ``half`` neighbours on each side: no lag.

    Near the start over fewer, as many left as right, since a loss falls steeply there. The last ``half`` values lie
    on the straight line fitted to the last window, which goes through its mean, instead of following the noise.
    NaN is left out, and stays NaN where it was.

    Example:
        >>> smooth(np.array([0.0, 3.0, 0.0, 3.0, 6.0, 9.0]), 1).round(9).tolist()
        [0.0, 1.0, 2.0, 3.0, 6.0, 9.0]
    """
    finite = np.isfinite(y)
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    with np.errstate(invalid="ignore"):
        means = _sums(np.where(finite, y, 0.0), reach, half) / _sums(finite.astype(float), reach, half)
    window = i[-2 * half - 1 :]
    known = window[finite[window]]
    if half and len(known) > half:
        slope, offset = np.polyfit(known - i[-1], y[known], 1)
        tail = i[-half:]
        means[tail] = offset + slope * (tail - i[-1])
    return np.where(finite, means, np.nan)


def _sums(y: Floats, reach: NDArray[np.intp], half: int) -> Floats:
    """Sum over ``reach`` neighbours on each side. No running sums: a spike would take the digits of all after it."""
    sums = np.array([y[i - r : i + r + 1].sum() if r < half else 0.0 for i, r in enumerate(reach.tolist())])
    if len(y) > 2 * half:
        sums[half : len(y) - half] = np.convolve(y, np.ones(2 * half + 1), "valid")
    return sums


def smoothing(points: int) -> int:
    """Neighbours on each side for a mean that shows the trend; 0 for so few points that they speak themselves."""
    return 0 if points < 40 else max(2, points // 80)


def thin(x: Floats, y: Floats, columns: int = _COLUMNS) -> tuple[Floats, Floats]:
    """At most four points per column: first and last, lowest and highest. A column of NaN alone keeps one."""
    if len(x) <= 4 * columns:
        return x, y
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * columns).astype(int), columns - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    keep: set[int] = {0, len(x) - 1}
    for start, end in zip(starts, [*starts[1:], len(x)], strict=True):
        part = y[start:end]
        if np.isfinite(part).any():
            keep |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
        else:
            keep.add(int(start))
    kept = sorted(keep)
    return x[kept], y[kept]


def linear_ticks(low: float, high: float, *, outward: bool = False, about: int = 5) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart.

    Args:
        low: Lower end.
        high: Upper end.
        outward: Enclose the range; else the ticks stay within.
        about: Intervals wanted.

    Example:
        >>> linear_ticks(0, 1000), linear_ticks(2.1, 2.9, outward=True)
        ([0.0, 200.0, 400.0, 600.0, 800.0, 1000.0], [2.0, 2.2, 2.4, 2.6, 2.8, 3.0])
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    slack = 1e-9 * (high - low) / step
    first, last = low / step, high / step
    first, last = (
        (math.floor(first + slack), math.ceil(last - slack)) if outward
        else (math.ceil(first - slack), math.floor(last + slack))
    )  # fmt: skip
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Ticks of a logarithmic axis that enclose a range: 1-2-5, then 1-3, then whole decades, whichever are few enough.

    Example:
        >>> log_ticks(0.3, 4), log_ticks(0.02, 900)
        ([0.2, 0.5, 1.0, 2.0, 5.0], [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0])
    """
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{m}e{d}") for d in decades for m in mantissas]
        marks = _enclose(marks, low, high)
        if len(marks) <= most:
            return marks
    stride = math.ceil((len(marks) - 1) / (most - 1))
    first = round(math.log10(marks[0]))
    intervals = math.ceil((len(marks) - 1) / stride)
    return [float(f"1e{first + i * stride}") for i in range(intervals + 1)]


def _enclose(marks: Sequence[float], low: float, high: float) -> list[float]:
    first = max(m for m in marks if m <= low * 1.000001)
    last = min(m for m in marks if m >= high * 0.999999 and m > first)
    return [m for m in marks if first <= m <= last]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of evenly spaced ticks in one style, all in k, M or B or all with as many decimals as the finest needs;
    of unevenly spaced ones, a logarithmic axis, each as short as it can be.

    Example:
        >>> tick_labels([0.0, 20000.0, 40000.0]), tick_labels([2.0, 2.5, 3.0]), tick_labels([0.0, 5e-6, 1e-5])
        (['0', '20k', '40k'], ['2.0', '2.5', '3.0'], ['0', '5e-06', '1e-05'])
        >>> tick_labels([1e-6, 0.01, 100.0, 1e6])
        ['1e-06', '0.01', '100', '1M']
    """
    gaps = np.diff(ticks)
    if len(ticks) > 2 and gaps.max() > 1.5 * gaps.min():
        return [_short(tick, abs(tick)) for tick in ticks]
    largest = max(map(abs, ticks))
    if largest >= 1e4 or largest < 1e-3:
        return [_short(tick, largest) for tick in ticks]
    decimals = max(len(f"{tick:.10f}".rstrip("0").split(".")[1]) for tick in ticks)
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _short(value: float, size: float) -> str:
    """A value in the unit that suits a size."""
    if value == 0:
        return "0"
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= (1e4 if unit == "k" else scale) and size < 1e13:
            return f"{value / scale:.6g}{unit}"
    return f"{value:.6g}"


def x_range(x: Floats) -> tuple[float, float]:
    """Ends of the step axis: from 0 unless the record starts late."""
    low, high = float(x.min()), float(x.max())
    low = 0.0 if low <= 0.1 * high else low
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _down(place: float) -> int:
    """From a fraction of the height to the SVG's downward coordinate; far outside is as good as outside."""
    return round(_SIZE * (1.0 - min(max(place, -9.0), 9.0)))


def _path(x: Floats, y: Floats, *, joined: bool) -> str:
    parts: list[str] = []
    drawing = False
    for i, (px, py) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if not math.isfinite(py):
            drawing = False
            continue
        point = f"{round(_SIZE * px)} {_down(py)}"
        alone = not joined or (not drawing and (i + 1 == len(y) or not math.isfinite(y[i + 1])))
        # A line of no length with a round cap is a dot of the stroke's width, round at any stretch.
        parts.append(f"M{point}h0" if alone else f"L{point}" if drawing else f"M{point}")
        drawing = joined
    return "".join(parts)


def _head(unit: str, series: Sequence[Series], rules: Sequence[Rule]) -> str:
    named: list[tuple[str, str, float]] = [(s.name, s.style, s.strength) for s in series if s.name]
    named += [(rule.name, "rule", 1.0) for rule in rules]
    keys = [
        f'<span class="key"><i class="{style}" style="opacity:{strength:.2f}"></i>{escape(name)}</span>'
        for name, style, strength in named
        if len(named) > 1
    ]
    return f'<div class="head"><span class="unit">{escape(unit)}</span><span class="keys">{"".join(keys)}</span></div>'
