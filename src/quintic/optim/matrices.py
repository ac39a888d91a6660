"""One Muon step for a stack of matrices of one shape, taken from any number of parameters.

Momentum, msign and the step run over one contiguous stack (matrices, n, m), so that a model of many small
matrices costs a few batched products. The stack is bounded; larger sets of parameters go through it in turns.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quintic.linalg.polar import msign_
from quintic.linalg.schatten import schatten_direction, schatten_exponent
from quintic.linalg.workspace import Workspace
from quintic.optim.decay import follow_top_space, spectral_decay_
from quintic.optim.lr import UPDATE_RMS, scale_factor
from quintic.optim.momentum import advance_
from quintic.optim.split import Part

__all__ = ["Piece", "chunks", "pieces_of", "update_matrices"]

_STACK_BYTES = 64 * 2**20  # of one stack; a step needs about four times this
_CPU_STACK_BYTES = 4 * 2**20  # on CPUs, which gain nothing from more


class Piece(NamedTuple):
    """Matrices of one shape within a parameter: a part of it, or a range of slices of a part that is a large stack."""

    parameter: Tensor
    """A view, as are the next two; their elements in order are (matrices, n, m) arrays."""
    gradient: Tensor
    momentum: Tensor
    matrices: int
    n: int
    m: int
    top_space: Tensor | None = None
    """State of spectral weight decay, (matrices, min(n, m), rank), see :mod:`quintic.optim.decay`."""

    @property
    def stack_bytes(self) -> int:
        """Size of these matrices in the momentum's dtype."""
        return self.matrices * self.n * self.m * self.momentum.dtype.itemsize


def pieces_of(weights: Part, gradient: Part, momentum: Part, top_space: Tensor | None = None) -> list[Piece]:
    """A part of a parameter, cut along its first axis if it is a stack larger than the working memory."""
    whole = Piece(weights.tensor, gradient.tensor, momentum.tensor, weights.matrices, weights.n, weights.m, top_space)
    if whole.stack_bytes <= (cap := _cap(momentum.tensor.device)):
        return [whole]
    length = len(weights.tensor)
    fitting = max(1, cap * length // whole.stack_bytes)
    if length <= fitting or weights.matrices % length:  # in the second case the first axis is within the matrix
        return [whole]
    each = weights.matrices // length
    tops = [None] * -(-length // fitting) if top_space is None else top_space.split(fitting * each)
    tensors = (part.tensor.split(fitting) for part in (weights, gradient, momentum))
    return [
        Piece(p, g, b, each * len(p), weights.n, weights.m, top) for p, g, b, top in zip(*tensors, tops, strict=True)
    ]


def chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces that fit in the working memory together; one that does not fit comes alone."""
    chunk: list[Piece] = []
    size = 0
    cap = _cap(pieces[0].momentum.device)
    for piece in pieces:
        more = piece.stack_bytes
        if chunk and size + more > cap:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += more
    yield chunk


def _cap(device: torch.device) -> int:
    return min(_STACK_BYTES, _CPU_STACK_BYTES) if device.type == "cpu" else _STACK_BYTES


def update_matrices(group: dict[str, Any], pieces: list[Piece], keep: Tensor | float, space: Workspace) -> None:
    """One step for matrices of one shape with the settings of one group.

    Args:
        group: lr, weight_decay, scale, norm, the settings of momentum and those of msign.
        pieces: Matrices of equal n, m, device and dtype of momentum; with or without spectral decay.
        keep: 1, or a 0-d tensor of 1 or 0 that turns this into no step, without being read.
        space: Buffers to work in.
    """
    momenta = [piece.momentum for piece in pieces]
    count, n, m = sum(piece.matrices for piece in pieces), pieces[0].n, pieces[0].m
    stack = space.get("stack", (count, n, m), momenta[0].dtype, momenta[0].device)
    views = _views(stack, pieces)
    gradients = [piece.gradient for piece in pieces]
    if isinstance(keep, Tensor):
        keep = keep.to(stack.device, stack.dtype)
        torch._foreach_copy_(views, gradients)
        stack.masked_fill_(keep == 0.0, 0.0)
        advance_(group, momenta, views, keep)
    else:
        advance_(group, momenta, gradients, keep, views)

    update = _direction(group, stack, space)
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    if group["scale"] == "rms":
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        factor = UPDATE_RMS * math.sqrt(n * m) / torch.where(norm > 0, norm, 1.0)
    else:
        factor = scale_factor(group["scale"], n, m)
    factor = keep * -lr * factor
    if isinstance(factor, Tensor):
        update.mul_(factor)
        factor = 1.0

    # Half-precision weights are updated in float32 and rounded once.
    targets = [p if p.dtype == stack.dtype else p.to(stack.dtype) for p in (piece.parameter for piece in pieces)]
    if group["weight_decay"]:
        amount = keep * lr * group["weight_decay"]
        if pieces[0].top_space is not None:
            weights = torch.empty_like(stack)
            of_weights = _views(weights, pieces)
            torch._foreach_copy_(of_weights, targets)
            _decay_top(weights, pieces, amount, keep)
            torch._foreach_copy_(targets, of_weights)
        else:
            torch._foreach_mul_(targets, 1.0 - amount)
    torch._foreach_add_(targets, views if update is stack else _views(update, pieces), alpha=factor)
    for piece, target in zip(pieces, targets, strict=True):
        if target is not piece.parameter:
            piece.parameter.copy_(target)


def _direction(group: dict[str, Any], stack: Tensor, space: Workspace) -> Tensor:
    """Steepest descent in the group's norm for every matrix of a stack, which may be overwritten."""
    vectors = 1 in stack.shape[-2:]  # the same in all norms, and exact without an iteration
    p = schatten_exponent(group["norm"])
    if p < math.inf and not vectors:
        return schatten_direction(stack, p)
    return msign_(
        stack,
        method="auto" if vectors else group["method"],
        steps=group["ns_steps"],
        coefficients=group["coefficients"],
        dtype=None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"]),
        space=space,
    )


def _views(stack: Tensor, pieces: list[Piece]) -> list[Tensor]:
    """The stack's matrices, piece by piece, each in the shape of its parameter."""
    if len(pieces) == len(stack) and all(piece.parameter.ndim == 2 for piece in pieces):
        return list(stack.unbind())
    parts = stack.split([piece.matrices for piece in pieces])
    return [part.view(piece.parameter.shape) for part, piece in zip(parts, pieces, strict=True)]


def _decay_top(weights: Tensor, pieces: list[Piece], amount: Tensor | float, keep: Tensor | float) -> None:
    """Spectral weight decay of a (matrices, n, m) stack, in place; the vectors move with it unless the step is bad."""
    states = [piece.top_space for piece in pieces if piece.top_space is not None]
    assert len(states) == len(pieces)
    V = follow_top_space(weights, old := torch.cat(states))
    if isinstance(keep, Tensor):
        V = torch.where(keep > 0.0, V, old)
    spectral_decay_(weights, V, amount)
    torch._foreach_copy_(states, list(V.split([len(state) for state in states])))
