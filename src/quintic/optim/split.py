"""The matrices that a stored tensor consists of, as views: stacks, convolutions, fused projections, heads.

A layout says how a tensor is read: ``stack`` (matrices in the last two axes), ``conv`` (one matrix
(out, in * kernel)), and for what is not a matrix in itself ``elements`` (each a 1 x 1 matrix, whose msign is its
sign), ``vector`` (one 1 x d matrix, whose msign is the vector over its length) and ``rows`` (each row a 1 x d matrix).

A fused matrix, or each one of a stack, is cut by a split (:class:`quintic.core.roles.Split`): G interleaved groups
with parts of sizes s_1 .. s_k in each have G (s_1 + .. + s_k) rows (or columns). Part i is the matrix of its rows of
all groups, or, with b_i blocks, b_i matrices of equal height:

| tensor | split |
|---|---|
| gate and up projection | {"blocks": 2} |
| [q, k, v], grouped-query | {"sizes": (q, kv, kv)} |
| [q, gate, k, v] | {"sizes": (q, q, kv, kv)} |
| per key-value head: its q heads, k, v | {"sizes": (q / kv * d, d, d), "groups": kv heads} |
| latent attention, down: latent and rotary key | {"sizes": (latent, rotary)} |
| latent attention, up, per head: k, v | {"sizes": (d_k, d_v), "groups": heads} |
| queries, each head a matrix | {"blocks": heads} |
| output projection, each head a matrix | {"axis": "columns", "blocks": heads} |

Msign, shape factor and decay then see the shape of the part. Note that small blocks make large updates under a
factor such as Moonlight's, 0.2 sqrt(max(n, m)) on a matrix of few rows (section 2.2 of the report).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from quintic.core import ConfigError, suggest

__all__ = ["LAYOUTS", "ORIENTATIONS", "Part", "parts_of"]

LAYOUTS = ("stack", "conv", "elements", "vector", "rows")
"""Ways to read a tensor as matrices."""
ORIENTATIONS = ("out_in", "in_out")
"""Ways to store a matrix: torch's Linear, and ``x @ W``."""
_KEYS = ("axis", "groups", "sizes", "blocks")
_AXES = ("rows", "columns")


class Part(NamedTuple):
    """Some matrices of one shape within a tensor."""

    tensor: Tensor
    """A view; its elements in logical order are a (matrices, n, m) array."""
    matrices: int
    n: int
    m: int


def parts_of(
    t: Tensor, layout: str = "stack", split: Mapping[str, Any] | None = None, orientation: str = "out_in"
) -> list[Part]:
    """Views of the matrices of a tensor in the orientation (out, in), one for each part of its split.

    Args:
        t: A parameter, its gradient or its momentum, any strides.
        layout: Name of :data:`LAYOUTS`.
        split: How each matrix is cut; ``None`` is not at all.
        orientation: Name of :data:`ORIENTATIONS`; of ``conv``, whether the first axis is the output.

    Raises:
        ConfigError: A name is unknown, or the numbers do not fit the shape.

    Example:
        >>> import torch
        >>> qkv = torch.zeros(96, 64)
        >>> [part[1:] for part in parts_of(qkv, split={"sizes": (64, 16, 16), "blocks": (4, 1, 1)})]
        [(4, 16, 64), (1, 16, 64), (1, 16, 64)]
        >>> [part[1:] for part in parts_of(torch.zeros(8, 64, 32)) + parts_of(torch.zeros(16, 3, 3, 3), "conv")]
        [(8, 64, 32), (1, 16, 27)]
    """
    if split is None and layout == "stack" and orientation == "out_in" and t.ndim >= 2:  # nearly always
        *lead, n, m = t.shape
        return [Part(t, math.prod(lead) if lead else 1, n, m)]
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}{suggest(str(layout), LAYOUTS)}")
    if orientation not in ORIENTATIONS:
        raise ConfigError(f"unknown orientation {orientation!r}{suggest(str(orientation), ORIENTATIONS)}")
    if layout in ("elements", "vector", "rows"):
        if split is not None:
            raise ConfigError(f"a split is of a matrix; layout {layout!r} has none")
        return [_simple(t, layout, orientation)]
    if t.ndim < 2:
        raise ConfigError(f"a tensor of shape {tuple(t.shape)} is not a matrix")
    if orientation == "in_out":
        t = t.transpose(0, 1) if layout == "conv" else t.mT
    row = 0 if layout == "conv" else t.ndim - 2
    count, n, m = math.prod(t.shape[:row]), t.shape[row], math.prod(t.shape[row + 1 :])
    if split is None:
        return [Part(t, count, n, m)]

    axis, groups, sizes, blocks = _resolved(split, n, m)
    if axis == "rows" and len(sizes) == 1:  # in order, whatever the groups: the tensor itself
        return [Part(t, count * blocks[0], n // blocks[0], m)]
    if axis == "columns" and layout == "conv":
        raise ConfigError("a convolution is split by rows only: its columns are input channels times kernel")
    along, across = (n, m) if axis == "rows" else (m, n)
    t = (t if axis == "rows" else t.mT).unflatten(row, (groups, along // groups))
    parts = []
    start = 0
    for size, number in zip(sizes, blocks, strict=True):
        part = t.narrow(row + 1, start, size)
        start += size
        each = groups * size // number
        # (.., groups, size, across) to (.., matrices, pieces, rows, across), each step a view.
        if size % each == 0:
            part = part.unflatten(row + 1, (size // each, 1, each))
        elif each % size == 0:
            part = part.unflatten(row, (number, each // size))
        else:
            raise ConfigError(f"blocks of {each} {axis} cut across the groups, which hold {size} of them")
        if axis == "columns":
            part = part.movedim(-1, -3)
        parts.append(Part(part, count * number, *((each, across) if axis == "rows" else (across, each))))
    return parts


def _simple(t: Tensor, layout: str, orientation: str) -> Part:
    if layout == "elements":
        return Part(t, t.numel(), 1, 1)
    if layout == "vector":
        return Part(t, 1, 1, t.numel())
    if t.ndim != 2:
        raise ConfigError(f"a tensor of shape {tuple(t.shape)} is not a table of rows; expected 2 axes")
    rows, width = t.shape
    return Part(t, rows, 1, width) if orientation == "out_in" else Part(t, rows, width, 1)


def _resolved(split: Mapping[str, Any], n: int, m: int) -> tuple[str, int, tuple[int, ...], tuple[int, ...]]:
    """(axis, groups, sizes, blocks) of a split, checked against an (n, m) matrix."""
    if unknown := split.keys() - set(_KEYS):
        name = sorted(unknown)[0]
        raise ConfigError(f"a split has no {name!r}{suggest(name, _KEYS)}")
    axis, groups = split.get("axis", "rows"), split.get("groups", 1)
    if axis not in _AXES:
        raise ConfigError(f"unknown axis {axis!r} of a split; expected rows or columns")
    length = n if axis == "rows" else m
    sizes = tuple(split.get("sizes", ())) or (length // max(1, groups),)
    blocks = split.get("blocks", 1)
    blocks = (blocks,) * len(sizes) if isinstance(blocks, int) else tuple(blocks)
    if groups < 1 or min(sizes) < 1 or groups * sum(sizes) != length:
        raise ConfigError(
            f"{groups} groups with parts of {sizes} have {groups * sum(sizes)} {axis}; the matrix has {length}"
        )
    if len(blocks) != len(sizes) or any(b < 1 or groups * s % b for b, s in zip(blocks, sizes, strict=True)):
        raise ConfigError(f"parts of {tuple(groups * s for s in sizes)} {axis} do not split into {blocks} blocks")
    return axis, groups, sizes, blocks
