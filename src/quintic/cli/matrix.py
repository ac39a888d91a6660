"""``quintic matrix``: which rows and columns explain a table, printed and drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quintic.cli.compress import compress
from quintic.cli.printing import say
from quintic.cli.table_file import NamedTable, read_table
from quintic.cli.table_picture import draw, picture_path, write_picture
from quintic.core import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["matrix"]

matrix = App(name="matrix", help="Say which rows and columns explain a table; compress a trained model.")
matrix.command(compress)

Drop = Annotated[list[str] | None, Parameter(name="--drop")]
AsJson = Annotated[bool, Parameter(name="--json", negative="")]
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
    header: bool | None = None,
    missing: str = "error",
    scale: bool = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    overwrite: bool = False,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Explain a table by a few of its columns and rows (CUR decomposition).

    Parameters
    ----------
    table
        CSV or TSV of numbers, or a matrix in a .npy file. A first line of names and a first column of names (or without
        a name) are recognised, and decimal commas where commas do not divide the cells.
    rank
        Columns and rows to choose; 8, or all of fewer, without --tol.
    tol
        Largest relative error instead: as many columns and rows as that takes.
    method
        Rule that chooses: quality, fast, pivoted-qr, leverage-top, k-means ...
    drop
        Name of a column to leave out; repeat for each.
    header
        Whether the first line has the names of columns, where it cannot be told: names that are numbers.
    missing
        Of cells that are empty, NA, N/A, NaN or null: error, drop-rows (leave out their rows) or mean (put the mean of
        the column).
    scale
        Divide every column by its root mean square, for columns in different units.
    out
        Picture to write; TABLE-cur.svg in this folder if left out, with a number if there is one.
    overwrite
        Replace a picture that exists.
    seed
        Seed of the rules that draw at random.
    as_json
        Print what was chosen as one JSON object.

    Examples
    --------
    quintic matrix cur table.csv --rank 8
    quintic matrix cur table.csv --tol 0.1 --drop id --json
    """
    from quintic.lowrank import cur as decompose

    target = picture_path(out, f"{table.stem}-cur.svg", overwrite)
    read, A, options = _read(table, drop, header, missing, scale, rank, tol)
    found = decompose(A, method=method, seed=seed, **options)
    columns, rows = _choice("column", read, A, found.cols), _choice("row", read, A, found.rows)
    title = f"{table.name}, and what {len(found.cols)} columns and {len(found.rows)} rows make of it"
    write_picture(target, draw(title, A, found.reconstruct(), columns.names, rows.names))
    result = _Result(read, A.shape, found.rank, found.error(), _least(A, found.rank), [columns, rows], target)
    if as_json:
        say(result.json())
        return
    result.print()
    say(f"picture: {target}")


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
    header: bool | None = None,
    missing: str = "error",
    scale: bool = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    overwrite: bool = False,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Write the columns of a table as combinations of a few of them, or its rows (interpolative decomposition).

    Parameters
    ----------
    table
        CSV or TSV of numbers, or a matrix in a .npy file. A first line of names and a first column of names (or without
        a name) are recognised, and decimal commas where commas do not divide the cells.
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
    header
        Whether the first line has the names of columns, where it cannot be told: names that are numbers.
    missing
        Of cells that are empty, NA, N/A, NaN or null: error, drop-rows (leave out their rows) or mean (put the mean of
        the column).
    scale
        Divide every column by its root mean square, for columns in different units.
    out
        Picture to write; TABLE-id.svg in this folder if left out, with a number if there is one.
    overwrite
        Replace a picture that exists.
    seed
        Seed of the rules that draw at random.
    as_json
        Print what was chosen as one JSON object.

    Examples
    --------
    quintic matrix id table.csv --rank 3 --side columns
    quintic matrix id table.csv --rank 3 --side rows --scale
    """
    from quintic.lowrank import interpolative as decompose

    target = picture_path(out, f"{table.stem}-id.svg", overwrite)
    read, A, options = _read(table, drop, header, missing, scale, rank, tol)
    found = decompose(A, side=side, method=method, seed=seed, **options)
    by_columns = side == "columns"
    chosen = _choice(side.removesuffix("s"), read, A, found.indices)
    title = f"{table.name}, and what {found.rank} {side} make of it"
    marked = (chosen.names, {}) if by_columns else ({}, chosen.names)
    write_picture(target, draw(title, A, found.reconstruct(), *marked))
    result = _Result(read, A.shape, found.rank, found.error(), _least(A, found.rank), [chosen], target)
    if as_json:
        say(result.json())
        return
    result.print()
    _print_combinations(read.columns if by_columns else read.rows, found.indices, found.Z if by_columns else found.Z.T)
    say(f"picture: {target}")


def _read(
    table: Path, drop: Drop, header: bool | None, missing: str, scale: bool, rank: int | None, tol: float | None
) -> tuple[NamedTable, NDArray[np.float64], dict[str, Any]]:
    """A table, its numbers as they are to be decomposed, and how many columns or rows to take."""
    read = read_table(table, drop or [], missing, header)
    A = _scaled(read.values) if scale else read.values
    return read, A, _options(A, rank, tol)


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


@dataclass(frozen=True)
class _Choice:
    """Columns or rows that were chosen, in the order of choice."""

    what: str
    """column or row."""
    names: dict[int, str]
    """Index: name."""
    errors: list[float]
    """Relative error that is left by each and those before it, by themselves."""

    def print(self) -> None:
        table = Table(
            f"{self.what}, in the order of choice", "error left by it and those above", box=None, pad_edge=False
        )
        for name, error in list(zip(self.names.values(), self.errors, strict=True))[:_SHOWN]:
            table.add_row(Text(name), f"{error:.3g}")
        Console().print(table)
        if len(self.names) > _SHOWN:
            say(f"and {len(self.names) - _SHOWN} more")

    def facts(self) -> list[dict[str, Any]]:
        pairs = zip(self.names.items(), self.errors, strict=True)
        return [{"index": index, "name": name, "error": error} for (index, name), error in pairs]


def _choice(what: str, read: NamedTable, A: NDArray[np.float64], chosen: NDArray[np.int64]) -> _Choice:
    names, along = (read.columns, A) if what == "column" else (read.rows, A.T)
    return _Choice(what, {int(i): names[int(i)] for i in chosen}, _errors(along, chosen))


@dataclass(frozen=True)
class _Result:
    """What was found, for a person and for a script."""

    read: NamedTable
    shape: tuple[int, ...]
    rank: int
    error: float
    least: float
    choices: list[_Choice]
    picture: Path

    def print(self) -> None:
        if self.read.header is not None:
            say(_names_from(self.read))
        if count := self.read.missing_cells:
            left_out = self.read.rows_left_out
            dealt = f"{left_out:,} rows are left out" if left_out else "each is the mean of its column"
            say(f"cells without a value: {count:,}; {dealt}")
        say(
            f"{self.read.path.name}: {self.shape[0]:,} rows x {self.shape[1]:,} columns; rank {self.rank} explains "
            f"{_explained(self.error)} of the squares; relative error {self.error:.3g}, the least of any "
            f"rank-{self.rank} matrix is {self.least:.3g}"
        )
        for choice in self.choices:
            choice.print()

    def json(self) -> str:
        facts = {"table": str(self.read.path), "shape": list(self.shape), "rank": self.rank, "error": self.error,
                 "least_error": self.least, "header": self.read.header, "row_names": self.read.labels,
                 "missing_cells": self.read.missing_cells,
                 "rows_left_out": self.read.rows_left_out, **{f"{c.what}s": c.facts() for c in self.choices},
                 "picture": str(self.picture)}  # fmt: skip
        return json.dumps(facts)


def _names_from(read: NamedTable) -> str:
    """What was taken as names, so that a line of numbers that were names does not pass for one of data."""
    columns = "from the first line" if read.header else "none (--header if the first line has them)"
    rows = "none" if read.labels is None else f"from the column {read.labels!r}"
    return f"names of columns: {columns}; of rows: {rows}"


def _least(A: NDArray[np.float64], rank: int) -> float:
    """Relative error of the truncated singular value decomposition."""
    from quintic.lowrank import svd

    return svd(A, rank=rank).error()


def _explained(error: float) -> str:
    """1 - error^2 in percent, which is rounded to 100 only where it is."""
    share = f"{1 - error**2:.2%}"
    return "more than 99.99%" if error > 0 and share == "100.00%" else share


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
