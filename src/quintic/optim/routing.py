"""Which parameter goes to Muon and which to AdamW, and why: one row per parameter.

Muon is for matrices that multiply dense vectors (posts kexue.fm/archives/10592, 10739, 11416): linear layers,
attention projections, experts (each slice of a stack on its own), routers, convolutions as (out, in * kernel).
AdamW takes embeddings, the output head, gains, biases, and the first convolution. Instead, Muon can take these too, as
matrices of one row (an embedding is many of them) or of one element: a diagonal matrix has the signs of its elements
as its matrix sign, and a 1 x d matrix is divided by its length (posts 10592, 11416).

A role that is declared (:func:`quintic.core.roles.declare`), by the module that created the parameter or from outside,
decides. Else it is inferred (:mod:`quintic.optim.inference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from quintic.core import ConfigError, suggest
from quintic.core.roles import Role, Split, declared_roles
from quintic.optim.inference import Guess, infer
from quintic.optim.lr import UPDATE_RMS, scale_factor
from quintic.optim.split import parts_of

__all__ = ["EMBEDDINGS", "VECTORS", "RolePart", "RoleRow", "RoleTable", "how_to_declare", "roles"]

_MUON = (Role.MATRIX, Role.EXPERT_STACK, Role.ROUTER)
_WITHOUT_ADAM = {"sign": ("elements", "sign of the momentum"), "l2": ("vector", "the momentum over its length")}

VECTORS = ("adamw", *_WITHOUT_ADAM)
"""What can update gains, biases and the like."""
EMBEDDINGS = ("adamw", "row-l2")
"""What can update embeddings and the output head."""


class RolePart(NamedTuple):
    """Matrices of one shape."""

    matrices: int
    n: int
    m: int
    scale: float
    """The shape factor in front of msign."""
    update_rms: float
    """RMS of a full-rank update per unit of learning rate."""


@dataclass(frozen=True)
class RoleRow:
    """What the optimizer will do with one parameter."""

    name: str
    """Qualified name, of the first place where the parameter is used."""
    shape: tuple[int, ...]
    role: Role
    algorithm: str
    """``muon`` or ``adamw``."""
    parts: tuple[RolePart, ...]
    """The matrices it consists of, one entry for each part of a split; none under AdamW."""
    why: str
    layout: str | None = None
    """How the tensor is read as matrices, see :mod:`quintic.optim.split`; None under AdamW."""
    split: Split | None = None
    orientation: str = "out_in"
    ambiguous: bool = False
    """The role was not declared and could not be told from the module."""
    frozen: bool = False
    """It wants no gradient: nothing happens to it before that changes."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def scale(self) -> float:
        """Multiplier of the learning rate: the shape factor in front of msign, largest of the parts; 1 for AdamW."""
        return max((part.scale for part in self.parts), default=1.0)

    @property
    def update_rms(self) -> float:
        """RMS of a full-rank update per unit of rate, largest of the parts. AdamW's is about 0.2 (post 11267)."""
        return max((part.update_rms for part in self.parts), default=UPDATE_RMS)


@dataclass(frozen=True, repr=False)
class RoleTable:
    """All rows; printed or shown they are aligned, with the totals."""

    rows: tuple[RoleRow, ...]

    def __iter__(self) -> Iterator[RoleRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> RoleRow:
        """The row of a parameter name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def ambiguous(self) -> tuple[RoleRow, ...]:
        """Rows whose role had to be assumed; frozen parameters need none."""
        return tuple(row for row in self.rows if row.ambiguous and not row.frozen)

    def parameters_under(self, algorithm: str) -> int:
        """Number of scalar parameters that an algorithm updates."""
        return sum(row.numel for row in self.rows if row.algorithm == algorithm and not row.frozen)

    def __repr__(self) -> str:
        header = ("parameter", "shape", "role", "algorithm", "matrices", "lr x", "rms / lr", "why")
        cells = [
            (
                row.name,
                " x ".join(map(str, row.shape)) or "scalar",
                row.role.value,
                row.algorithm,
                ", ".join(f"{p.matrices} x ({p.n}, {p.m})" for p in row.parts),
                _each(f"{part.scale:.4g}" for part in row.parts) or f"{row.scale:.4g}",
                _each(f"{part.update_rms:.3g}" for part in row.parts) or f"{row.update_rms:.3g}",
                ("frozen: " if row.frozen else "AMBIGUOUS: " if row.ambiguous else "") + row.why,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *cells)
        ]
        muon, adamw = self.parameters_under("muon"), self.parameters_under("adamw")
        share = 100 * muon / max(1, muon + adamw)
        frozen = sum(row.numel for row in self.rows if row.frozen)
        lines.append(
            f"total: {muon + adamw:,} parameters, {muon:,} ({share:.1f}%) under Muon, {adamw:,} under AdamW"
            + (f"; {frozen:,} more are frozen" if frozen else "")
        )
        return "\n".join(lines)


def _each(numbers: Iterable[str]) -> str:
    """The numbers of all parts, or one if they are equal."""
    found = list(numbers)
    return found[0] if len(set(found)) == 1 else ", ".join(found)


def roles(
    model: nn.Module,
    *,
    scale: str = "moonlight",
    strict: bool = False,
    vectors: str = "adamw",
    embeddings: str = "adamw",
) -> RoleTable:
    """The table of what ``Muon(model, scale=scale, ...)`` does with each parameter.

    Args:
        model: Any module; tied parameters appear once.
        scale: Muon's shape factor, see :mod:`quintic.optim.lr`.
        strict: Refuse to assume anything.
        vectors: What updates gains, biases and the like: ``adamw``, ``sign`` or ``l2``.
        embeddings: What updates embeddings and the head: ``adamw`` or ``row-l2``.

    Raises:
        ConfigError: A name is unknown, a declared role does not fit the shape, or (``strict``) a role is ambiguous.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 100))
        >>> [(row.name, row.role.value, row.algorithm, row.scale) for row in roles(model) if len(row.shape) == 2]
        [('0.weight', 'embedding', 'adamw', 1.0), ('1.weight', 'matrix', 'muon', 1.6),
         ('2.weight', 'matrix', 'muon', 1.6), ('3.weight', 'head', 'adamw', 1.0)]
    """
    for option, value, known in (("vectors", vectors, VECTORS), ("embeddings", embeddings, EMBEDDINGS)):
        if value not in known:
            raise ConfigError(f"unknown {option} {value!r}{suggest(str(value), known)}")
    declared = declared_roles(model)
    inferred = infer(model, declared)
    rows = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in declared:
            role, known = declared[name].role, declared[name]
            guess = Guess(role, "declared", "stack", split=known.split, orientation=known.orientation)
            expected = 3 if role is Role.EXPERT_STACK else 2
            if role in _MUON and len(shape) != expected:
                raise ConfigError(f"{name} is declared as {role.value} but has shape {shape}; expected {expected} axes")
        else:
            guess = inferred[name]
        layout, why, split, orientation = guess.layout, guess.why, guess.split, guess.orientation
        if guess.role not in _MUON or layout is None:
            layout, split, orientation = None, None, "out_in"
            if guess.role in (Role.EMBEDDING, Role.HEAD) and len(shape) == 2:
                if embeddings == "row-l2":
                    layout, why = "rows", f"{why}; each row of the momentum over its length"
                    orientation = "in_out" if guess.role is Role.EMBEDDING else "out_in"
            elif vectors != "adamw":
                layout, how = _WITHOUT_ADAM[vectors]
                why = f"{why}; {how}"
        parts: tuple[RolePart, ...] = ()
        if layout is not None:
            try:
                found = parts_of(parameter.detach(), layout, split, orientation)
            except ConfigError as error:
                raise ConfigError(f"{name} of shape {shape}: {error}") from None
            parts = tuple(_part(scale, *part[1:]) for part in found)
        algorithm = "adamw" if layout is None else "muon"
        frozen = not parameter.requires_grad
        row = RoleRow(
            name, shape, guess.role, algorithm, parts, why, layout, split, orientation, guess.ambiguous, frozen
        )
        rows.append(row)
    table = RoleTable(tuple(rows))
    if strict and table.ambiguous:
        listed = "\n".join(f"  {row.name} {row.shape}: {row.why}" for row in table.ambiguous)
        raise ConfigError(
            f"the role of {len(table.ambiguous)} parameters is ambiguous:\n{listed}\n"
            f"{how_to_declare(table.ambiguous[0])}; or pass parameter groups with algorithm='muon' or 'adamw'"
        )
    return table


def how_to_declare(row: RoleRow) -> str:
    """What settles an assumed role, in the words of a message."""
    of_muon = "expert stack" if len(row.shape) == 3 else "matrix"
    role, other = ("head", of_muon) if row.algorithm == "muon" else ("embedding", of_muon)
    return f"Say what they are, as by quintic.declare(model, {row.name!r}, {role!r}), or {other!r}"


def _part(scale: str, matrices: int, n: int, m: int) -> RolePart:
    factor = scale_factor(scale, n, m) if n * m else 1.0
    return RolePart(matrices, n, m, factor, factor / math.sqrt(max(n, m, 1)))
