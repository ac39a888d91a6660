"""Line plots as SVG files that read well on a light and on a dark page: a picture of a document, not of a screen.

Ticks are those of the reports' charts. Points carry error bars where there are several seeds. Colours follow the
reader's preference by a media query inside the file, and lines differ in dash and mark as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quintic.report.charts import linear_ticks, log_ticks, tick_labels

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 64, 52
_STYLE = """
.plot { font: 13px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --grid: #d8dee4; --page: #ffffff;
  --c0: #0b6bcb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #a16207; --c5: #be185d; --c6: #0e7490; }
@media (prefers-color-scheme: dark) { .plot { --ink: #e6edf3; --soft: #9198a1; --grid: #343b44; --page: #0d1117;
  --c0: #58a6ff; --c1: #ff9b61; --c2: #4ade80; --c3: #c792ff; --c4: #facc15; --c5: #ff7ab8; --c6: #22d3ee; } }
.page { fill: var(--page); } .plot text { fill: var(--soft); } .plot .title { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--grid); } .rule { stroke: var(--soft); stroke-dasharray: 2 4; stroke-width: 1.5; }
.plot .over { paint-order: stroke; stroke: var(--page); stroke-width: 4; stroke-linejoin: round; }
.line { fill: none; stroke-width: 2; } .bar { stroke-width: 1.5; }
"""
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 4", "14 4", "4 2")


@dataclass(frozen=True)
class Line:
    """Points of one line, with half widths of error bars if there are any; what is not finite is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


def image(name: str, title: str) -> str:
    """Markdown that shows ``benchmarks/plots/NAME.svg`` in RESULTS.md."""
    return f"![{title}](benchmarks/plots/{name}.svg)"


def draw(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    rules: dict[str, float] | None = None,
    marks: bool = True,
) -> str:
    """A plot as SVG.

    Args:
        title: One line that says what is seen.
        lines: At most seven.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        log_x: Logarithmic horizontal axis; its ticks are the values of x if they are few.
        log_y: Logarithmic vertical axis.
        rules: {name: height} of dashed horizontal lines.
        marks: Draw the points.
    """
    assert len(lines) <= len(_DASHES)
    rules = rules or {}
    xs = [v for line in lines for v in line.x]
    ys = list(rules.values())
    for line in lines:
        for i, v in enumerate(line.y):
            half = line.error[i] if line.error and math.isfinite(line.error[i]) else 0.0
            ys += [u for u in (v - half, v + half) if math.isfinite(u) and (u > 0 or not log_y)]
    few = sorted(set(xs))
    x_ticks = few if log_x and 2 <= len(few) <= 9 else _ticks(xs, log_x)
    y_ticks = _ticks(ys, log_y)
    x_labels = [f"{t:g}" for t in x_ticks] if log_x else tick_labels(x_ticks)

    legend, below = _legend([line.name for line in lines])
    top, height = _TOP + below, _HEIGHT + below

    def place_x(v: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _part(v, x_ticks, log_x)

    def place_y(v: float) -> float:
        return height - _BOTTOM - (height - top - _BOTTOM) * _part(v, y_ticks, log_y)

    out = [f'<rect class="page" width="{_WIDTH}" height="{height}"/>']
    out.append(f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>')
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        at = place_y(tick)
        out.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(x_ticks, x_labels, strict=True):
        out.append(f'<text x="{place_x(tick):.1f}" y="{height - _BOTTOM + 20}" text-anchor="middle">{label}</text>')
    out.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 10}" text-anchor="middle">{escape(x)}</text>')
    middle = (top + height - _BOTTOM) / 2
    out.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    for value in rules.values():
        out.append(f'<path class="rule" d="M{_LEFT} {place_y(value):.1f}H{_WIDTH - _RIGHT}"/>')
    for index, line in enumerate(lines):
        colour = f'stroke="var(--c{index})"'
        style = f'{colour} stroke-dasharray="{_DASHES[index]}"'
        points = [
            (place_x(a), place_y(b), line.error[i] if line.error else math.nan, b)
            for i, (a, b) in enumerate(zip(line.x, line.y, strict=True))
            if math.isfinite(b) and (b > 0 or not log_y)
        ]
        d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in points)
        if points:
            out.append(f'<path class="line" {style} d="{d}"/>')
        for a, b, half, value in points:
            if math.isfinite(half) and (value > half or not log_y):
                ends = f"M{a:.1f} {place_y(value - half):.1f}V{place_y(value + half):.1f}"
                out.append(f'<path class="bar" {colour} d="{ends}"/>')
            if marks:
                out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="var(--c{index})"/>')
        if line.name:
            at_x, at_y = legend[index]
            out.append(f'<path class="line" {style} d="M{at_x:.0f} {at_y - 4}h26"/>')
            out.append(f'<text x="{at_x + 32:.0f}" y="{at_y}">{escape(line.name)}</text>')
    for label, value in rules.items():
        place = f'x="{_WIDTH - _RIGHT}" y="{place_y(value) - 5:.1f}" text-anchor="end"'
        out.append(f'<text class="over" {place}>{escape(label)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" class="plot" role="img" '
        f'width="{_WIDTH}" height="{height}" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    )
    return f"{head}<style>{_STYLE}</style>{''.join(out)}</svg>\n"


def _legend(names: Sequence[str]) -> tuple[list[tuple[float, int]], int]:
    """Where each key begins, in rows that fit, and how much lower the plot begins for more than one row."""
    places = []
    x, y = float(_LEFT), 47
    for name in names:
        width = 58 + 6.7 * len(name)
        if x + width > _WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 20
        places.append((x, y))
        x += width
    return places, y - 47


def _ticks(values: Sequence[float], log: bool) -> list[float]:
    low, high = min(values), max(values)
    return log_ticks(low, high, most=8) if log else linear_ticks(low, high, outward=True)


def _part(value: float, ticks: Sequence[float], log: bool) -> float:
    if log:
        return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
    return (value - ticks[0]) / (ticks[-1] - ticks[0])
