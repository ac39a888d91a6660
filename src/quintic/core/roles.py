"""Parameter roles: what a parameter *is*, declared by the module that creates it.

A matrix that multiplies dense vectors, a stack of such matrices (experts), a table of rows (embedding),
the output head, a vector of gains. The optimizer routes by role (Muon for matrices, AdamW for the rest),
the initial weights are drawn by role, and sharding follows it. Nothing is guessed from a name or a shape.

Roles live on the *module*, under the parameter's local name, so they survive ``deepcopy``, ``.to()``,
meta-device construction and sharding wrappers that replace the parameter object.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Constant", "Init", "Normal", "ParameterRole", "Role", "Split", "declare", "declared_roles"]

_ATTRIBUTE = "_quintic_roles"


class Role(enum.Enum):
    """What a parameter is to the mathematics, not where it sits."""

    MATRIX = "matrix"
    """(out, in): multiplies dense vectors."""
    EXPERT_STACK = "expert stack"
    """(experts, out, in): one matrix per expert."""
    ROUTER = "router"
    """(experts, in): a matrix whose rows score experts."""
    EMBEDDING = "embedding"
    """(vocabulary, width): rows picked by index."""
    HEAD = "head"
    """(vocabulary, width): the output layer."""
    VECTOR = "vector"
    """Gains, biases and scalars."""


@dataclass(frozen=True)
class Normal:
    """Initial values from a normal distribution with mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initial values all equal."""

    value: float


Init = Normal | Constant


class Split(TypedDict, total=False):
    """Which matrices a fused one consists of; plain data. An optimizer of matrices updates each by itself.

    The table of :mod:`quintic.optim.split` has the usual layouts.
    """

    axis: str
    """``rows`` (outputs, the default) or ``columns`` (inputs): what is cut."""
    groups: int
    """Number of interleaved groups, each of which holds all the parts; 1 by default."""
    sizes: tuple[int, ...]
    """Rows (columns) of each part within a group; one part by default."""
    blocks: int | tuple[int, ...]
    """Number of equal matrices in each part, over all groups: a number for all parts, or one for each; 1 by default."""


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is and how it starts."""

    role: Role
    init: Init
    split: Split | None = None
    """Which matrices it consists of; ``None`` is one."""
    orientation: str = "out_in"
    """How a matrix is stored: ``out_in`` as torch's Linear, or ``in_out`` for ``x @ W``."""


def declare(
    module: nn.Module,
    name: str,
    role: Role,
    init: Init,
    *,
    row_blocks: int = 1,
    split: Split | None = None,
    orientation: str = "out_in",
) -> None:
    """Declare the role of ``module.name``, a parameter the module has just created.

    Args:
        module: The module that owns the parameter directly.
        name: The attribute's name, without dots.
        role: What it is.
        init: The distribution of its initial values.
        row_blocks: Number of equal matrices on top of each other; short for ``split={"blocks": row_blocks}``.
        split: Which matrices a fused one consists of.
        orientation: ``out_in``, or ``in_out`` for a matrix that is used as ``x @ W``.
    """
    parameter = module._parameters.get(name)
    assert parameter is not None, f"{type(module).__name__} has no parameter {name!r}"
    assert row_blocks == 1 or parameter.shape[-2] % row_blocks == 0, f"{name}: rows do not split in {row_blocks}"
    assert row_blocks == 1 or split is None, f"{name}: row_blocks is short for a split"
    if row_blocks > 1:
        split = {"blocks": row_blocks}
    module.__dict__.setdefault(_ATTRIBUTE, {})[name] = ParameterRole(role, init, split, orientation)


def declared_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """Return {qualified parameter name: role} of every declared parameter, in ``named_parameters`` order."""
    found: dict[str, ParameterRole] = {}
    for prefix, module in model.named_modules():
        for name, role in module.__dict__.get(_ATTRIBUTE, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = role
    return {name: found[name] for name, _ in model.named_parameters() if name in found}
