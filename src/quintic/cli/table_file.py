"""Tables of numbers as people have them: CSV and TSV with names, missing cells and decimal commas, and .npy arrays."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quintic.core import ConfigError, DataError, suggest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MISSING", "NamedTable", "read_table"]

MISSING = ("error", "drop-rows", "mean")
"""What can be done about missing cells: refuse, leave out their rows, or put the mean of their columns."""

_NO_VALUE = ("", "na", "n/a", "nan", "null")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)
_WITH_COMMAS = re.compile(r"[-+]?(?=.*\d)[\d.,]*,[\d.,]*")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_YEAR = re.compile(r"(1[5-9]|2[01])\d\d")
_TAKEN = "expected CSV or TSV as UTF-8 text, or one matrix written by numpy.save (.npy)"
_SHOWN = 8  # columns that an error names with a cell of each


@dataclass(frozen=True)
class NamedTable:
    """Numbers with names."""

    path: Path
    rows: list[str]
    columns: list[str]
    values: NDArray[np.float64]
    missing_cells: int = 0
    """How many had no value; their rows are left out, or they have the mean of their column."""
    rows_left_out: int = 0
    header: bool | None = None
    """Whether the first line has the names of columns; else they are numbered. None of a .npy file."""
    labels: str | None = None
    """Name of the column with the names of rows; None if they are numbered."""


def read_table(path: Path, drop: list[str], missing: str = "error", header: bool | None = None) -> NamedTable:
    """Read numbers from a CSV, TSV or .npy file, with the names of rows and columns if it has them.

    The first line has names if a cell beyond its first is no number, if its first cell is empty, if that is no
    number while all below it are, or if the others are years, one after the other, and in no line below. What cannot be
    told so is said by ``header``. The first column has names if it has none itself, as pandas and R write it, or if
    more than half of it is text. Decimal commas are read where commas do not divide the cells, no cell has a decimal
    point, and not all of them could be thousands (1,500).

    Args:
        path: The file.
        drop: Names of columns to leave out.
        missing: A name of :data:`MISSING`. Missing are empty cells, NA, N/A, NaN and null.
        header: Whether the first line of a text has names; None to tell by what is in it.

    Raises:
        DataError: The file cannot be read, is empty or ragged, or has a cell that is missing or not a finite number.
        ConfigError: A column to leave out does not exist, ``missing`` is unknown, or ``header`` is for a .npy file.
    """
    if missing not in MISSING:
        raise ConfigError(f"--missing {missing}: expected {', '.join(MISSING)}{suggest(missing, MISSING)}")
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"PK"):
        raise DataError(f"{path} is an archive, as .npz and .xlsx files are; {_TAKEN}")
    if start == b"\x93NUMPY":
        if header:
            raise ConfigError(f"{path} is a matrix without names; --header is for CSV and TSV")
        table, places = _array(path, drop)
    else:
        table, places = _text(path, drop, header)
    return _without_gaps(table, places, missing)


def _text(path: Path, drop: list[str], header: bool | None) -> tuple[NamedTable, list[str]]:
    """Names and numbers of a text, NaN where a cell is missing, and where its rows are."""
    import numpy as np

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); {_TAKEN}") from None
    lines = _lines(path, text)
    if not lines:
        raise DataError(f"{path} is empty; expected a table of numbers")
    width = len(lines[0][1])
    for number, row in lines:
        if len(row) != width:
            raise DataError(f"{path}, line {number} has {len(row)} cells, expected {width} as in the first line")
    head = lines[0][1]
    named = _has_names([row for _, row in lines]) if header is None else header
    unnamed = named and width > 1 and not head[0]
    body = lines[1:] if named else lines
    if not body:
        raise DataError(f"{path} has names but no numbers")
    texts = sum(_is_name(row[0]) for _, row in body)
    labelled = width > 1 and (unnamed or 2 * texts > len(body)) and head[0] not in drop
    columns = head if named else [f"column {j + 1}" for j in range(width)]
    kept = _kept(path, columns, drop, int(labelled))
    values = np.full((len(body), len(kept)), np.nan)
    wrong: dict[int, tuple[int, str]] = {}  # column: line and text of its first cell that is no number
    for i, (number, row) in enumerate(body):
        for j, at in enumerate(kept):
            if _is_number(row[at]):
                values[i, j] = float(row[at])
            elif not _is_missing(row[at]):
                wrong.setdefault(at, (number, row[at]))
    if wrong:
        raise _not_numbers(path, columns, wrong)
    places = [f"line {number}" for number, _ in body]
    rows = [row[0] for _, row in body] if labelled else places
    labels = (columns[0] or "column 1") if labelled else None
    return NamedTable(path, rows, [columns[j] for j in kept], values, header=named, labels=labels), places


def _has_names(rows: list[list[str]]) -> bool:
    """Whether the first line has the names of columns, as far as it can be told."""
    head, below = rows[0], [row[0] for row in rows[1:]]
    if (len(head) > 1 and not head[0]) or any(_is_name(cell) for cell in head[1:] or head):
        return True
    if _is_name(head[0]) and below and not any(map(_is_name, below)):
        return True
    return _are_years(head) and not any(map(_are_years, rows[1:]))


def _are_years(row: list[str]) -> bool:
    """Two or more, with the same time between them; the first cell may be something else."""
    years = [int(cell) for cell in row if _YEAR.fullmatch(cell)]
    steps = {after - before for before, after in itertools.pairwise(years)}
    return all(map(_YEAR.fullmatch, row[1:])) and len(steps) == 1 and steps != {0}


def _array(path: Path, drop: list[str]) -> tuple[NamedTable, list[str]]:
    """The numbers of a .npy file, of which NaN is a missing one, and where its rows are."""
    import numpy as np

    try:
        A = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; {_TAKEN}") from None
    if A.ndim != 2 or 0 in A.shape or A.dtype.kind not in "biuf":
        raise DataError(
            f"{path} has shape {A.shape} and dtype {A.dtype}; expected a matrix (rows, columns) of real numbers"
        )
    columns = [f"column {j + 1}" for j in range(A.shape[1])]
    kept = _kept(path, columns, drop, 0)
    values = np.array(A if len(kept) == len(columns) else A[:, kept], dtype=np.float64)
    if (infinite := np.isinf(values)).any():
        i, j = np.argwhere(infinite)[0]
        raise DataError(
            f"{path}, row {i + 1}, {columns[kept[j]]}: {values[i, j]} is not a finite number, one of "
            f"{int(infinite.sum())}; fill it in, or leave the column out with {_drops([columns[kept[j]]])}"
        )
    places = [f"row {i + 1}" for i in range(len(values))]
    return NamedTable(path, places, [columns[j] for j in kept], values), places


def _kept(path: Path, columns: list[str], drop: list[str], first: int) -> list[int]:
    """Positions of the columns that are not left out."""
    for name in drop:
        if name not in columns:
            raise ConfigError(f"{path} has no column {name!r} to leave out{suggest(name, columns)}")
    kept = [j for j in range(first, len(columns)) if columns[j] not in drop]
    if not kept:
        raise DataError(f"{path} has no column of numbers left")
    return kept


def _without_gaps(table: NamedTable, places: list[str], missing: str) -> NamedTable:
    """The table with its missing cells dealt with, as asked."""
    import numpy as np

    gaps = np.isnan(table.values)
    at = np.argwhere(gaps)
    if not (count := len(at)):
        return table
    rows, columns = np.unique(at[:, 0]), np.unique(at[:, 1])
    if missing == "error":
        cells = "a cell is empty or has no value" if count == 1 else f"one of {count:,} cells without a value"
        raise DataError(
            f"{table.path}, {places[at[0, 0]]}, column {table.columns[at[0, 1]]!r}: {cells}; --missing drop-rows "
            f"leaves out {len(rows):,} of {len(gaps):,} rows, --missing mean fills in the mean of the column, and "
            f"{_drops([table.columns[j] for j in columns])} leaves out {len(columns)} of {len(table.columns)} columns"
        )
    if missing == "drop-rows":
        if len(rows) == len(gaps):
            raise DataError(f"{table.path}: no row is without a missing cell; leave out columns, or use --missing mean")
        left_out = set(rows.tolist())
        names = [name for i, name in enumerate(table.rows) if i not in left_out]
        values = np.delete(table.values, rows, 0)
        return replace(table, rows=names, values=values, missing_cells=count, rows_left_out=len(rows))
    if nothing := [table.columns[j] for j in columns if gaps[:, j].all()]:
        raise DataError(f"{table.path}: no number to take the mean of; leave out with {_drops(nothing)}")
    # Sums of large numbers could overflow; those of their shares cannot.
    size = np.maximum(np.nanmax(np.abs(table.values), 0), np.finfo(float).tiny)
    values = np.where(gaps, np.nanmean(table.values / size, 0) * size, table.values)
    return replace(table, values=values, missing_cells=count)


def _lines(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Number and cells of every line that is not blank; a quoted cell may span several."""
    lines: list[tuple[int, list[str]]] = []
    first = re.sub(r'"[^"]*"', "", next((line for line in text.splitlines() if line.strip()), ""))
    delimiter = max("\t;,", key=first.count)
    for other in "\t;":  # a first line of numbers may have more decimal commas than cells
        if other in first and all(_is_number(c) or _DECIMAL_COMMA.fullmatch(c.strip()) for c in first.split(other)):
            delimiter = other
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    number = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                lines.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number} cannot be read: {error}; is a quotation mark missing?") from None
    return lines if delimiter == "," else _with_points(lines)


def _with_points(lines: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Decimal commas made points, where they can be nothing else."""
    cells = [cell for _, row in lines for cell in row]
    commas = [cell for cell in cells if _DECIMAL_COMMA.fullmatch(cell)]
    if all(map(_THOUSANDS.fullmatch, commas)) or any(map(_DECIMAL_POINT.fullmatch, cells)):
        return lines
    return [
        (number, [cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell for cell in row])
        for number, row in lines
    ]


def _not_numbers(path: Path, columns: list[str], wrong: dict[int, tuple[int, str]]) -> DataError:
    """All columns with text at once, so that one command leaves them out."""

    def why(cell: str) -> str:
        return f"{cell!r} is not a {'number' if _is_text(cell) else 'finite number'}"

    found = sorted(wrong.items())
    names = [columns[at] for at, _ in found]
    commas = any(_WITH_COMMAS.fullmatch(cell) for _, (_, cell) in found)
    hint = "; write decimals with a point, and no thousands separators" if commas else ""
    if len(found) == 1:
        ((at, (number, cell)),) = found
        return DataError(
            f"{path}, line {number}, column {columns[at]!r}: {why(cell)}; "
            f"fill it in, or leave the column out with {_drops(names)}{hint}"
        )
    told = [f"{columns[at]!r} ({cell!r} in line {number})" for at, (number, cell) in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return DataError(
        f"{path}: {len(found)} columns have cells that are no finite numbers: {', '.join(told)}{more}; "
        f"fill them in, or leave the columns out with {_drops(names)}{hint}"
    )


def _drops(names: list[str]) -> str:
    """Options that leave out columns, to be copied."""
    return " ".join(f"--drop {shlex.quote(name)}" for name in names)


def _is_number(cell: str) -> bool:
    return not _is_missing(cell) and not _is_text(cell) and math.isfinite(float(cell))


def _is_missing(cell: str) -> bool:
    return cell.lower() in _NO_VALUE


def _is_name(cell: str) -> bool:
    """Text, and no number in another style of writing."""
    return _is_text(cell) and not _WITH_COMMAS.fullmatch(cell)


def _is_text(cell: str) -> bool:
    """Neither missing nor any number, be it infinite; 1_000, which Python reads as a number, is one of a name."""
    if _is_missing(cell):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return "_" in cell
