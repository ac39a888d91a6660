"""``quintic matrix``: which rows and columns explain a table, printed and drawn."""

from __future__ import annotations

import base64
import csv
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quintic.cli.compress import compress
from quintic.cli.printing import say
from quintic.core import ConfigError, DataError, suggest
from quintic.core.files import atomic_write, check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["matrix"]

matrix = App(name="matrix", help="Say which rows and columns explain a table; compress a trained model.")
matrix.command(compress)

Drop = Annotated[list[str] | None, Parameter(name="--drop")]
_SHOWN = 20  # rows of what is printed that could be as long as the table


@matrix.command
def cur(
    table: Path,
    /,
    *,
    rank: int | None = None,
    tol: float | None = None,
    method: str = "quality",
    drop: Drop = None,
    scale: bool = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    seed: int = 0,
) -> None:
    """Explain a table by a few of its columns and rows (CUR decomposition).

    Example: quintic matrix cur table.csv --rank 8

    Parameters
    ----------
    table
        CSV or TSV of numbers. A first line of names and a first column of names are recognised.
    rank
        Columns and rows to choose; 8, or all of fewer, without --tol.
    tol
        Largest relative error instead: as many columns and rows as that takes.
    method
        Rule that chooses: quality, fast, pivoted-qr, leverage-top, k-means ...
    drop
        Name of a column to leave out; repeat for each.
    scale
        Divide every column by its root mean square, for columns in different units.
    out
        Picture to write; TABLE-cur.svg in this folder if left out.
    seed
        Of what is drawn at random.
    """
    from quintic.lowrank import cur as decompose

    target = _picture_path(out, f"{table.stem}-cur.svg")
    read, A, options = _read(table, drop, scale, rank, tol)
    found = decompose(A, method=method, seed=seed, **options)
    _headline(read, A, found.rank, found.error())
    console = Console()
    _print_choice(console, "column", read.columns, found.cols, _errors(A, found.cols))
    _print_choice(console, "row", read.rows, found.rows, _errors(A.T, found.rows))
    title = f"{table.name}, and what {len(found.cols)} columns and {len(found.rows)} rows make of it"
    _write_picture(target, draw(title, A, found.reconstruct(), read, list(found.rows), list(found.cols)))


@matrix.command(name="id")
def interpolative(
    table: Path,
    /,
    *,
    rank: int | None = None,
    tol: float | None = None,
    side: str = "columns",
    method: str = "quality",
    drop: Drop = None,
    scale: bool = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    seed: int = 0,
) -> None:
    """Write the columns of a table as combinations of a few of them, or its rows (interpolative decomposition).

    Example: quintic matrix id table.csv --rank 3 --side columns

    Parameters
    ----------
    table
        CSV or TSV of numbers. A first line of names and a first column of names are recognised.
    rank
        Columns or rows to choose; 8, or all of fewer, without --tol.
    tol
        Largest relative error instead: as many as that takes.
    side
        columns or rows.
    method
        Rule that chooses: quality, fast, pivoted-qr, leverage-top, k-means ...
    drop
        Name of a column to leave out; repeat for each.
    scale
        Divide every column by its root mean square, for columns in different units.
    out
        Picture to write; TABLE-id.svg in this folder if left out.
    seed
        Of what is drawn at random.
    """
    from quintic.lowrank import interpolative as decompose

    target = _picture_path(out, f"{table.stem}-id.svg")
    read, A, options = _read(table, drop, scale, rank, tol)
    found = decompose(A, side=side, method=method, seed=seed, **options)
    _headline(read, A, found.rank, found.error())
    console = Console()
    by_columns = side == "columns"
    names = read.columns if by_columns else read.rows
    _print_choice(
        console, side.removesuffix("s"), names, found.indices, _errors(A if by_columns else A.T, found.indices)
    )
    _print_combinations(names, found.indices, found.Z if by_columns else found.Z.T)
    title = f"{table.name}, and what {found.rank} {side} make of it"
    chosen = list(found.indices)
    rows, columns = ([], chosen) if by_columns else (chosen, [])
    _write_picture(target, draw(title, A, found.reconstruct(), read, rows, columns))


@dataclass(frozen=True)
class NamedTable:
    """Numbers with names."""

    path: Path
    rows: list[str]
    columns: list[str]
    values: NDArray[np.float64]


def read_table(path: Path, drop: list[str]) -> NamedTable:
    """Read numbers from a CSV or TSV file; names are the first line and the first column where those are no numbers.

    Raises:
        DataError: The file cannot be read, is empty or ragged, or has a cell that is not a finite number.
        ConfigError: A column to leave out does not exist.
    """
    import numpy as np

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    first = text.split("\n", 1)[0]
    delimiter = max("\t;,", key=first.count)
    lines = [(i, row) for i, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1) if any(row)]
    if not lines:
        raise DataError(f"{path} is empty; expected a table of numbers")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise DataError(f"{path}, line {number} has {len(row)} cells, expected {width} as in the first line")
    head = [cell.strip() for cell in lines[0][1]]
    named = any(not _is_number(cell) for cell in head[1:] or head)
    body = lines[1:] if named else lines
    if not body:
        raise DataError(f"{path} has names but no numbers")
    labelled = width > 1 and any(not _is_number(row[0]) for _, row in body) and head[0] not in drop
    columns = head if named else [f"column {j + 1}" for j in range(width)]
    for name in drop:
        if name not in columns:
            raise ConfigError(f"{path} has no column {name!r} to leave out{suggest(name, columns)}")
    kept = [j for j in range(int(labelled), width) if columns[j] not in drop]
    if not kept:
        raise DataError(f"{path} has no column of numbers left")
    values = np.empty((len(body), len(kept)))
    for i, (number, row) in enumerate(body):
        for j, at in enumerate(kept):
            if not _is_number(row[at]):
                found = f"{row[at].strip()!r} is not a number" if row[at].strip() else "a cell is empty"
                raise DataError(
                    f"{path}, line {number}, column {columns[at]!r}: {found}; "
                    f"fill it in, or leave the column out with --drop {columns[at]!r}"
                )
            values[i, j] = float(row[at])
    rows = [row[0].strip() if labelled else f"line {number}" for number, row in body]
    return NamedTable(path, rows, [columns[j] for j in kept], values)


def _read(
    table: Path, drop: Drop, scale: bool, rank: int | None, tol: float | None
) -> tuple[NamedTable, NDArray[np.float64], dict[str, Any]]:
    """A table, its numbers as they are to be decomposed, and how many columns or rows to take."""
    read = read_table(table, drop or [])
    A = _scaled(read.values) if scale else read.values
    return read, A, _options(A, rank, tol)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _scaled(A: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    size = np.sqrt(np.mean((A / np.maximum(np.abs(A).max(0), 1e-300)) ** 2, axis=0)) * np.abs(A).max(0)
    return A / np.where(size > 0, size, 1.0)


def _options(A: NDArray[np.float64], rank: int | None, tol: float | None) -> dict[str, Any]:
    if rank is not None and tol is not None:
        raise ConfigError("--rank and --tol exclude each other")
    if tol is not None:
        return {"tol": tol}
    return {"rank": min(8, *A.shape) if rank is None else rank}


def _errors(A: NDArray[np.float64], chosen: NDArray[np.int64]) -> list[float]:
    """Relative error that the first, the first two ... chosen columns leave of A by themselves."""
    import numpy as np

    scale = np.abs(A).max() or 1.0
    E = A / scale
    whole = float(np.linalg.norm(E)) or 1.0
    errors = []
    for j in chosen:
        q = E[:, j]
        length = np.linalg.norm(q)
        if length > 1e-14 * whole:
            q = q / length
            E = E - np.outer(q, q @ E)
        errors.append(float(np.linalg.norm(E)) / whole)
    return errors


def _headline(read: NamedTable, A: NDArray[np.float64], rank: int, error: float) -> None:
    from quintic.lowrank import svd

    least = svd(A, rank=rank).error()
    say(
        f"{read.path.name}: {A.shape[0]:,} rows x {A.shape[1]:,} columns; rank {rank} explains {_explained(error)} of "
        f"the squares; relative error {error:.3g}, the least of any rank-{rank} matrix is {least:.3g}"
    )


def _explained(error: float) -> str:
    """1 - error^2 in percent, which is rounded to 100 only where it is."""
    share = f"{1 - error**2:.2%}"
    return "more than 99.99%" if error > 0 and share == "100.00%" else share


def _print_choice(console: Console, what: str, names: list[str], chosen: Any, errors: list[float]) -> None:
    table = Table(f"{what}, in the order of choice", "error left by it and those above", box=None, pad_edge=False)
    for at, error in list(zip(chosen, errors, strict=True))[:_SHOWN]:
        table.add_row(Text(names[int(at)]), f"{error:.3g}")
    console.print(table)
    if len(chosen) > _SHOWN:
        say(f"and {len(chosen) - _SHOWN} more", console=console)


def _print_combinations(names: list[str], chosen: Any, Z: NDArray[np.float64]) -> None:
    import numpy as np

    rest = [j for j in range(len(names)) if j not in {int(i) for i in chosen}]
    for j in rest[:_SHOWN]:
        order = np.argsort(-np.abs(Z[:, j]))[:4]
        terms = [f"{Z[i, j]:+.3g} {names[int(chosen[i])]}" for i in order if abs(Z[i, j]) > 1e-3]
        more = " ..." if len(chosen) > len(order) else ""
        say(f"{names[j]} ~ {' '.join(terms) or '0'}{more}")
    if len(rest) > _SHOWN:
        say(f"and {len(rest) - _SHOWN} more")


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
    read: NamedTable,
    rows: list[int],
    columns: list[int],
) -> str:
    """The table and its approximation side by side as SVG, with the chosen rows and columns marked and named."""
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
    for at, label in _spread([(c + 0.5) / A.shape[1] for c in columns], [read.columns[c] for c in columns]):
        x = left + _PANEL * at[0]
        shown = left + _PANEL * at[1]
        parts.append(f'<path class="mark" d="M{x:.1f} {_TOP + _PANEL}V{_TOP}L{shown:.1f} {_TOP - 12}"/>')
        parts.append(
            f'<text class="name" transform="translate({shown + 4:.1f} {_TOP - 16}) rotate(-60)">{escape(label)}</text>'
        )
    for at, label in _spread([(r + 0.5) / A.shape[0] for r in rows], [read.rows[r] for r in rows]):
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


def _picture_path(out: Path | None, name: str) -> Path:
    target = out or Path(name)
    if target.suffix.lower() != ".svg":
        raise ConfigError(f"--out {target}: the picture is an SVG file; choose a name that ends in .svg")
    check_folder(target.parent)
    return target


def _write_picture(target: Path, svg: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, svg)
    say(f"picture: {target}")
