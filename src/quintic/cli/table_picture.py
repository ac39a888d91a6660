"""The picture of ``quintic matrix``: a table beside what a few of its rows and columns make of it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from quintic.cli.outputs import output_path
from quintic.core import ConfigError
from quintic.core.files import atomic_write, check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["draw", "picture_path", "write_picture"]

_PANEL, _GAP, _TOP, _LEFT = 330, 34, 180, 150
_MOST_PIXELS = 400
_STYLE = """
.skeleton { font: 12px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --mark: #0b6bcb; }
@media (prefers-color-scheme: dark) {
  .skeleton { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --mark: #58a6ff; } }
.page { fill: var(--page); } .skeleton text { fill: var(--soft); }
.skeleton .title { fill: var(--ink); font-weight: 600; } .frame { stroke: var(--soft); fill: none; }
.mark { stroke: var(--mark); stroke-width: 1.5; stroke-opacity: 0.8; fill: none; }
.skeleton .name { fill: var(--mark); } image { image-rendering: pixelated; }
"""


def draw(
    title: str,
    A: NDArray[np.float64],
    made: NDArray[np.float64],
    columns: dict[int, str],
    rows: dict[int, str],
) -> str:
    """The table and its approximation side by side as SVG, with the chosen {index: name} marked and named."""
    import numpy as np

    # Every column has its own full colour: units differ.
    peak = np.maximum(np.abs(A).max(0), np.finfo(float).tiny)
    left, right = _LEFT, _LEFT + _PANEL + _GAP
    width, height = right + _PANEL + 20, _TOP + _PANEL + 44
    parts = [f'<rect class="page" width="{width}" height="{height}"/>']
    parts.append(f'<text class="title" x="20" y="26" font-size="15">{escape(title)}</text>')
    for x, values, name in ((left, A, "the table"), (right, made, "its approximation")):
        parts.append(
            f'<image x="{x}" y="{_TOP}" width="{_PANEL}" height="{_PANEL}" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{_heat_map(values / peak)}"/>'
            f'<rect class="frame" x="{x}" y="{_TOP}" width="{_PANEL}" height="{_PANEL}"/>'
            f'<text x="{x + _PANEL / 2}" y="{_TOP + _PANEL + 22}" text-anchor="middle">{name}</text>'
        )
    for at, label in _spread([(c + 0.5) / A.shape[1] for c in columns], list(columns.values())):
        x = left + _PANEL * at[0]
        shown = left + _PANEL * at[1]
        parts.append(f'<path class="mark" d="M{x:.1f} {_TOP + _PANEL}V{_TOP}L{shown:.1f} {_TOP - 12}"/>')
        parts.append(
            f'<text class="name" transform="translate({shown + 4:.1f} {_TOP - 16}) rotate(-60)">{escape(label)}</text>'
        )
    for at, label in _spread([(r + 0.5) / A.shape[0] for r in rows], list(rows.values())):
        y = _TOP + _PANEL * at[0]
        shown = _TOP + _PANEL * at[1]
        parts.append(f'<path class="mark" d="M{left + _PANEL} {y:.1f}H{left}L{left - 12} {shown:.1f}"/>')
        parts.append(f'<text class="name" x="{left - 16}" y="{shown + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="skeleton" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
    )
    return f"{head}<style>{_STYLE}</style>{''.join(parts)}</svg>\n"


def _spread(places: list[float], names: list[str], room: float = 16 / _PANEL) -> list[tuple[tuple[float, float], str]]:
    """Places of marks and of their names, which keep apart; names beyond what fits are left out."""
    order = sorted(range(len(places)), key=places.__getitem__)
    order = order[: int(1 / room) + 1]
    shown: list[float] = []
    for i in order:
        shown.append(max(places[i], shown[-1] + room) if shown else places[i])
    over = max(0.0, shown[-1] - 1.0) if shown else 0.0
    for i in range(len(shown) - 1, -1, -1):  # push back what ran over the end
        limit = 1.0 - (len(shown) - 1 - i) * room
        shown[i] = min(shown[i], limit) if over else shown[i]
    return [((places[i], at), names[i][:20]) for i, at in zip(order, shown, strict=True)]


def _heat_map(relative: NDArray[np.float64]) -> str:
    """PNG in base64 of values in -1 ... 1, transparent where 0; large tables by the mean of blocks."""
    import numpy as np

    from quintic.report.experts import LIMIT, load_image

    for axis in (0, 1):
        count = relative.shape[axis]
        if count > _MOST_PIXELS:
            starts = np.arange(_MOST_PIXELS) * count // _MOST_PIXELS
            sizes = np.diff(np.append(starts, count))
            relative = np.add.reduceat(relative, starts, axis) / (sizes[:, None] if axis == 0 else sizes)
    return base64.b64encode(load_image(relative * LIMIT)).decode()


def picture_path(out: Path | None, name: str, overwrite: bool) -> Path:
    """Where to draw: what was asked for, or a free name in this folder.

    Raises:
        ConfigError: It has another ending, exists and may not be replaced, or cannot be written.
    """
    if out is not None and out.suffix.lower() != ".svg":
        raise ConfigError(f"--out {out}: the picture is an SVG file; choose a name that ends in .svg")
    target = output_path(out, Path(name), overwrite)
    check_folder(target.parent)
    return target


def write_picture(target: Path, svg: str) -> None:
    """Write the picture, and the folder it is to be in. What is no character, as in names of files, is a "?" there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, svg.encode("utf-8", "replace"))
