"""Parameter roles: what a parameter *is*, declared by the module that creates it.

A matrix that multiplies dense vectors, a stack of such matrices (experts), a table of rows (embedding),
the output head, a vector of gains. The optimizer routes by role (Muon for matrices, AdamW for the rest),
the initial weights are drawn by role, and sharding follows it. Nothing is guessed from a name or a shape.

Roles live on the *module*, under the parameter's local name, so they survive ``deepcopy``, ``.to()``,
meta-device construction and sharding wrappers that replace the parameter object.

A module declares its own parameters where it creates them; of a model that somebody else wrote they are declared
from outside, by qualified names: ``declare(model, "blocks.*.qkv.weight", "matrix", split={"blocks": 3})``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypedDict

from quintic.core.errors import ConfigError, suggest

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
    init: Init | None = None
    """``None`` if it was declared from outside, by somebody who does not draw it."""
    split: Split | None = None
    """Which matrices it consists of; ``None`` is one."""
    orientation: str = "out_in"
    """How a matrix is stored: ``out_in`` as torch's Linear, or ``in_out`` for ``x @ W``."""


def declare(
    module: nn.Module,
    name: str,
    role: Role | str,
    init: Init | None = None,
    *,
    row_blocks: int = 1,
    split: Split | None = None,
    orientation: str = "out_in",
) -> None:
    """Declare the role of ``module.name``: what :func:`quintic.optim.roles` and everything that follows it go by.

    Args:
        module: The module that has the parameter, itself or in a submodule.
        name: The parameter's name as in ``named_parameters``, or a pattern for several, such as ``blocks.*.qkv.weight``
            (a star stands for anything, dots too).
        role: What it is: a :class:`Role`, or its value, such as ``"head"``. AdamW takes an embedding, a head or a
            vector, and Muon the others.
        init: The distribution of its initial values, where :func:`quintic.core.initial.initialize_` is to draw them.
            By default that of an earlier declaration stays.
        row_blocks: Number of equal matrices on top of each other; short for ``split={"blocks": row_blocks}``.
        split: Which matrices a fused one consists of.
        orientation: ``out_in``, or ``in_out`` for a matrix that is used as ``x @ W``.

    Raises:
        ConfigError: No parameter has this name, there is no such role, or the rows do not divide.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> declare(model, "2.weight", "head")
        >>> {name: declared.role.value for name, declared in declared_roles(model).items()}
        {'2.weight': 'head'}
    """
    try:
        role = Role(role)
    except ValueError:
        raise ConfigError(f"unknown role {role!r}{suggest(role, [known.value for known in Role])}") from None
    if row_blocks != 1 and split is not None:
        raise ConfigError(f"{name}: row_blocks={row_blocks} is short for a split, which is given too; give one of them")
    if row_blocks != 1:
        split = {"blocks": row_blocks}
    named = [(full, *full.rpartition(".")[::2]) for full in _matching(module, name)]
    for full, path, local in named:
        shape = tuple(module.get_submodule(path).get_parameter(local).shape)
        if row_blocks != 1 and (len(shape) < 2 or row_blocks < 1 or shape[-2] % row_blocks):
            raise ConfigError(f"{full} of shape {shape}: its rows do not divide into {row_blocks} blocks")
    for _, path, local in named:
        declared = module.get_submodule(path).__dict__.setdefault(_ATTRIBUTE, {})
        known = init or (declared[local].init if local in declared else None)
        declared[local] = ParameterRole(role, known, split, orientation)


def _matching(module: nn.Module, name: str) -> list[str]:
    """Qualified names of the parameters that a name or a pattern means, at least one."""
    if module._parameters.get(name) is not None:
        return [name]
    known = [full for full, _ in module.named_parameters(remove_duplicate=False)]
    found = [name] if name in known else [full for full in known if fnmatchcase(full, name)]
    if not found:
        inside = [full for full in known if full.startswith(f"{name}.")]
        raise ConfigError(f"{type(module).__name__} has no parameter {name!r}{_advice(name, inside, known)}")
    return found


def _advice(name: str, inside: Sequence[str], known: Sequence[str]) -> str:
    """What may have been meant by a name that no parameter has."""
    if inside:
        return f"; did you mean {' or '.join(map(repr, inside[:3]))}?"
    return suggest(name, known) if len(known) <= 20 else suggest(name, known, cutoff=0.0)


def declared_roles(model: nn.Module) -> dict[str, ParameterRole]:
    """Return {qualified parameter name: role} of every declared parameter, in ``named_parameters`` order.

    A parameter that several modules share has the role that is declared in the first of them that has any.
    """
    by_name: dict[str, ParameterRole] = {}
    shared: dict[int, ParameterRole] = {}
    for prefix, module in model.named_modules():
        for name, role in module.__dict__.get(_ATTRIBUTE, {}).items():
            by_name[f"{prefix}.{name}" if prefix else name] = role
            shared.setdefault(id(module._parameters.get(name)), role)
    found = {name: by_name.get(name) or shared.get(id(p)) for name, p in model.named_parameters()}
    return {name: role for name, role in found.items() if role is not None}
