"""Which parameter goes to Muon and which to AdamW, and why: one row per parameter.

Muon is for matrices that multiply dense vectors (posts kexue.fm/archives/10592, 10739, 11416): linear layers,
attention projections, experts (each slice of a stack on its own), routers, convolutions as (out, in * kernel).
AdamW takes embeddings, the output head, gains, biases, and the first convolution. Instead, Muon can take these too, as
matrices of one row (an embedding is many of them) or of one element: a diagonal matrix has the signs of its elements
as its matrix sign, and a 1 x d matrix is divided by its length (posts 10592, 11416).

A role that is declared (:func:`quintic.core.roles.declare`), by the module that created the parameter or from outside,
decides. Else it is inferred from the module's type, from tied weights and, for the output head only, from names.
What cannot be told is marked ambiguous: parameters of unknown modules go to AdamW, and a last linear layer
that may or may not be the output goes to Muon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from quintic.core import ConfigError, suggest
from quintic.core.roles import ParameterRole, Role, Split, declared_roles
from quintic.optim.lr import UPDATE_RMS, scale_factor
from quintic.optim.split import parts_of

__all__ = ["EMBEDDINGS", "VECTORS", "RolePart", "RoleRow", "RoleTable", "how_to_declare", "roles"]

_HEAD_NAMES = {"lm_head", "head", "output", "classifier", "unembed", "unembedding", "embed_out", "to_logits", "score"}
_LAST_NAMES = {*_HEAD_NAMES, "fc"}  # of a last layer only: others are called so too
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
        """Rows whose role had to be assumed."""
        return tuple(row for row in self.rows if row.ambiguous)

    def parameters_under(self, algorithm: str) -> int:
        """Number of scalar parameters that an algorithm updates."""
        return sum(row.numel for row in self.rows if row.algorithm == algorithm)

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
                ("AMBIGUOUS: " if row.ambiguous else "") + row.why,
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
        lines.append(f"total: {muon + adamw:,} parameters, {muon:,} ({share:.1f}%) under Muon, {adamw:,} under AdamW")
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
    inferred = _infer(model, declared)
    rows = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in declared:
            role, known = declared[name].role, declared[name]
            guess = _Guess(role, "declared", "stack", split=known.split, orientation=known.orientation)
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
        rows.append(
            RoleRow(name, shape, guess.role, algorithm, parts, why, layout, split, orientation, guess.ambiguous)
        )
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


class _Guess(NamedTuple):
    role: Role
    why: str
    layout: str | None = None
    ambiguous: bool = False
    split: Split | None = None
    orientation: str = "out_in"


def _infer(model: nn.Module, declared: Mapping[str, ParameterRole]) -> dict[str, _Guess]:
    """Roles by module type, for every parameter, under the name that ``named_parameters`` gives it."""
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    vocabularies = {tuple(m.weight.shape) for m in modules if isinstance(m, nn.Embedding)}
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    tied = tables & {id(m.weight) for m in linears}
    output = getattr(model, "get_output_embeddings", lambda: None)()  # Hugging Face models name their head
    head = id(output.weight) if isinstance(output, nn.Linear) else None
    first = next((m for m in modules if isinstance(m, (nn.Linear, *_CONV))), None)

    found: dict[str, _Guess] = {}
    last_linear = None
    seen: set[int] = set()
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{local}" if path else local
            guess = _infer_one(path, module, local, parameter, is_first=module is first)
            if isinstance(module, nn.Linear) and local == "weight":
                last_linear = name
                if id(parameter) in tied:
                    guess = _Guess(Role.HEAD, "tied to an embedding")
                elif id(parameter) == head:
                    guess = _Guess(Role.HEAD, "the model's output embedding")
                elif path.rsplit(".", 1)[-1].lower() in _HEAD_NAMES:
                    guess = _Guess(Role.HEAD, "output layer by name")
                elif module is linears[-1] and _named_as_last(path):
                    guess = _Guess(Role.HEAD, "last layer, and output layer by name")
                elif tuple(parameter.shape) in vocabularies and module is linears[-1]:
                    guess = _Guess(Role.HEAD, "last layer, as large as the embedding")
            elif id(parameter) in tied:
                guess = _Guess(Role.EMBEDDING, "embedding, tied to the output layer")
            found[name] = guess
    known = [*(d.role for d in declared.values()), *(g.role for name, g in found.items() if name not in declared)]
    if last_linear is not None and last_linear not in declared and Role.HEAD not in known and not tied:
        why = "last linear layer; should it be the output layer, it belongs to AdamW"
        found[last_linear] = _Guess(Role.MATRIX, why, "stack", ambiguous=True)
    return found


def _named_as_last(path: str) -> bool:
    """Whether a last layer has, or lies in, an output's name: head.fc, classifier.6; not layers.11.output.dense."""
    for part in path.lower().split("."):
        if part.isdigit():
            return False
        if part in _LAST_NAMES:
            return True
    return False


def _infer_one(path: str, module: nn.Module, local: str, parameter: nn.Parameter, *, is_first: bool) -> _Guess:
    """What the module's type says of one of its parameters."""
    kind = type(module).__name__
    if parameter.ndim < 2 and local == "weight" and isinstance(module, (nn.Linear, nn.Embedding, *_CONV)):
        raise ConfigError(
            f"{path or kind}.weight of {kind} has shape {tuple(parameter.shape)}: it was flattened or sharded away. "
            "Shard with torch's fully_shard, which keeps shapes, or make the optimizer before"
        )
    if parameter.ndim < 2:
        return _Guess(Role.VECTOR, f"{local} of {kind}")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _Guess(Role.EMBEDDING, "embedding")
    if parameter.ndim == 2 and (isinstance(module, nn.Linear) or ("Linear" in kind and local == "weight")):
        return _Guess(Role.MATRIX, f"{local} of {kind}", "stack")
    if isinstance(module, _CONV):
        if is_first:
            return _Guess(Role.MATRIX, "first convolution: its inputs are pixels, not features")
        if module.groups > 1:
            return _Guess(Role.MATRIX, "grouped convolution: not one matrix")
        return _Guess(Role.MATRIX, f"{kind} as (out, in * kernel)", "conv")
    if isinstance(module, _CONV_TRANSPOSED):
        return _Guess(Role.MATRIX, "transposed convolution: its first axis is the input")
    if isinstance(module, nn.MultiheadAttention) and parameter.ndim == 2:
        fused: Split | None = {"blocks": 3} if local == "in_proj_weight" else None
        return _Guess(Role.MATRIX, "attention projection", "stack", split=fused)
    if kind == "Conv1D" and parameter.ndim == 2:
        return _Guess(Role.MATRIX, "Hugging Face's Conv1D, a matrix (in, out)", "stack", orientation="in_out")
    if isinstance(module, nn.RNNBase):
        return _Guess(Role.MATRIX, "recurrent weights, all gates as one matrix", "stack")
    if parameter.ndim == 2 and "Router" in kind:
        return _Guess(Role.ROUTER, f"{local} of {kind}", "stack")
    if "Norm" in kind or "bias" in local:
        return _Guess(Role.VECTOR, f"{local} of {kind}")
    if parameter.ndim == 3 and (_EXPERT_NAME.search(f"{path}.{local}") or _EXPERT_NAME.search(kind)):
        return _Guess(Role.EXPERT_STACK, "three axes in a module of experts", "stack")
    return _Guess(Role.VECTOR, f"{local} of {kind}: {parameter.ndim} axes, role not declared, so AdamW", ambiguous=True)
