"""Which parameter goes to Muon and which to AdamW, and why: one row per parameter.

Muon is for matrices that multiply dense vectors (posts kexue.fm/archives/10592, 10739, 11416): linear layers,
attention projections, experts (each slice of a stack on its own), routers, convolutions as (out, in * kernel).
AdamW takes embeddings, the output head, gains, biases, and the first convolution.

A role declared by the module that created the parameter (:mod:`quintic.core.roles`) decides. For other modules the
role is inferred from the module's type, from tied weights and, for the output head only, from names.
What cannot be told is marked ambiguous: parameters of unknown modules go to AdamW, and a last linear layer
that may or may not be the output goes to Muon.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from quintic.core import ConfigError
from quintic.core.roles import ParameterRole, Role, declared_roles
from quintic.optim.lr import UPDATE_RMS, scale_factor

__all__ = ["RoleRow", "RoleTable", "matrix_shape", "roles"]

_HEAD_NAMES = {"lm_head", "head", "output", "classifier", "unembed", "unembedding", "embed_out", "to_logits", "score"}
_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MUON = (Role.MATRIX, Role.EXPERT_STACK, Role.ROUTER)


@dataclass(frozen=True)
class RoleRow:
    """What the optimizer will do with one parameter."""

    name: str
    """Qualified name, of the first place where the parameter is used."""
    shape: tuple[int, ...]
    role: Role
    algorithm: str
    """``muon`` or ``adamw``."""
    layout: str | None
    """How a tensor is read as matrices: ``stack`` (the last two axes), ``conv`` (out, everything else) or None."""
    row_blocks: int
    """Number of equal matrices on top of each other in one, such as a fused gate and up projection."""
    scale: float
    """Multiplier of the learning rate: the shape factor in front of msign; 1 for AdamW."""
    update_rms: float
    """RMS of a full-rank update per unit of learning rate. AdamW's is about 0.2 by theory (post 11267)."""
    why: str
    ambiguous: bool = False
    """The role was not declared and could not be told from the module."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RoleTable:
    """All rows; ``str()`` prints them aligned, with the totals."""

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

    def __str__(self) -> str:
        header = ("parameter", "shape", "role", "algorithm", "lr x", "rms / lr", "why")
        cells = [
            (
                row.name,
                " x ".join(map(str, row.shape)) or "scalar",
                row.role.value,
                row.algorithm,
                f"{row.scale:.4g}",
                f"{row.update_rms:.3g}",
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


def matrix_shape(shape: tuple[int, ...], layout: str, row_blocks: int = 1) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a tensor read under a layout.

    Example:
        >>> matrix_shape((8, 64, 32), "stack"), matrix_shape((16, 3, 3, 3), "conv"), matrix_shape((64, 32), "stack", 2)
        ((8, 64, 32), (1, 16, 27), (2, 32, 32))
    """
    if layout == "conv":
        count, rows, columns = 1, shape[0], math.prod(shape[1:])
    else:
        count, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
    return count * row_blocks, rows // row_blocks, columns


def roles(model: nn.Module, *, scale: str = "moonlight", strict: bool = False) -> RoleTable:
    """The table of what ``Muon(model, scale=scale)`` does with each parameter.

    Args:
        model: Any module; tied parameters appear once.
        scale: Muon's shape factor, see :mod:`quintic.optim.lr`.
        strict: Refuse to assume anything.

    Raises:
        ConfigError: With ``strict``, if a role is ambiguous; always, if the declared role does not fit the shape.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 100))
        >>> [(row.name, row.role.value, row.algorithm, row.scale) for row in roles(model) if len(row.shape) == 2]
        [('0.weight', 'embedding', 'adamw', 1.0), ('1.weight', 'matrix', 'muon', 1.6),
         ('2.weight', 'matrix', 'muon', 1.6), ('3.weight', 'head', 'adamw', 1.0)]
    """
    declared = declared_roles(model)
    inferred = _infer(model, declared)
    rows = []
    for name, parameter in model.named_parameters():
        shape, blocks = tuple(parameter.shape), 1
        if name in declared:
            role, blocks = declared[name].role, declared[name].row_blocks
            guess = _Guess(role, f"declared, {blocks} row blocks" if blocks > 1 else "declared", "stack")
            expected = 3 if role is Role.EXPERT_STACK else 2
            if role in _MUON and len(shape) != expected:
                raise ConfigError(f"{name} is declared as {role.value} but has shape {shape}; expected {expected} axes")
        else:
            guess = inferred[name]
        if guess.role in _MUON and guess.layout is not None:
            _, n, m = matrix_shape(shape, guess.layout, blocks)
            factor = scale_factor(scale, n, m) if n * m else 1.0
            rms = factor / math.sqrt(max(n, m, 1))
            where = ("muon", guess.layout, blocks, factor, rms)
        else:
            where = ("adamw", None, 1, 1.0, UPDATE_RMS)
        rows.append(RoleRow(name, shape, guess.role, *where, guess.why, guess.ambiguous))
    table = RoleTable(tuple(rows))
    if strict and table.ambiguous:
        listed = "\n".join(f"  {row.name} {row.shape}: {row.why}" for row in table.ambiguous)
        raise ConfigError(
            f"the role of {len(table.ambiguous)} parameters is ambiguous:\n{listed}\n"
            "Declare it with quintic.core.roles.declare in the module that creates it, "
            "or pass parameter groups with algorithm='muon' or 'adamw'"
        )
    return table


class _Guess(NamedTuple):
    role: Role
    why: str
    layout: str | None = None
    ambiguous: bool = False


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


def _infer_one(path: str, module: nn.Module, local: str, parameter: nn.Parameter, *, is_first: bool) -> _Guess:
    """What the module's type says of one of its parameters."""
    kind = type(module).__name__
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
        return _Guess(Role.MATRIX, "attention projection", "stack")
    if isinstance(module, nn.RNNBase):
        return _Guess(Role.MATRIX, "recurrent weights, all gates as one matrix", "stack")
    if parameter.ndim == 2 and "Router" in kind:
        return _Guess(Role.ROUTER, f"{local} of {kind}", "stack")
    if "Norm" in kind or "bias" in local:
        return _Guess(Role.VECTOR, f"{local} of {kind}")
    if parameter.ndim == 3 and (_EXPERT_NAME.search(f"{path}.{local}") or _EXPERT_NAME.search(kind)):
        return _Guess(Role.EXPERT_STACK, "three axes in a module of experts", "stack")
    return _Guess(Role.VECTOR, f"{local} of {kind}: {parameter.ndim} axes, role not declared, so AdamW", ambiguous=True)
