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

from quintic.linalg import msign
from quintic.linalg.schatten import schatten_direction, schatten_exponent
from quintic.optim.decay import follow_top_space, spectral_decay_
from quintic.optim.lr import UPDATE_RMS, scale_factor
from quintic.optim.split import Part

__all__ = ["Piece", "chunks", "pieces_of", "update_matrices"]

_STACK_BYTES = 64 * 2**20  # of one stack; a step needs about four times this


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
        return self.matrices * self.n * self.m * self.momentum.element_size()


def pieces_of(weights: Part, gradient: Part, momentum: Part, top_space: Tensor | None = None) -> list[Piece]:
    """A part of a parameter, cut along its first axis if it is a stack larger than the working memory."""
    whole = Piece(weights.tensor, gradient.tensor, momentum.tensor, *weights[1:], top_space)
    length = len(weights.tensor) if weights.tensor.ndim else 1
    fitting = max(1, _STACK_BYTES * length // whole.stack_bytes)
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
    for piece in pieces:
        if chunk and size + piece.stack_bytes > _STACK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += piece.stack_bytes
    yield chunk


def update_matrices(group: dict[str, Any], pieces: list[Piece], bad: Tensor) -> None:
    """One step for matrices of one shape with the settings of one group.

    Args:
        group: lr, weight_decay, momentum, nesterov, scale, maximize, norm and msign's settings.
        pieces: Matrices of equal n, m, device and dtype of momentum; with or without spectral decay.
        bad: 0-d bool that turns this into no step, without being read.
    """
    parameters = [piece.parameter for piece in pieces]
    momenta = [piece.momentum for piece in pieces]
    counts = [piece.matrices for piece in pieces]
    n, m, dtype, device = pieces[0].n, pieces[0].m, momenta[0].dtype, momenta[0].device
    stack = torch.empty((sum(counts), n, m), dtype=dtype, device=device)
    bad = bad.to(device)
    keep = (~bad).to(dtype)
    mu, lr = group["momentum"], group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())

    views = _views(stack, parameters, counts)
    torch._foreach_copy_(views, [piece.gradient for piece in pieces])
    if group["maximize"]:
        stack.neg_()
    stack.masked_fill_(bad, 0.0)
    torch._foreach_mul_(momenta, 1.0 - keep * (1.0 - mu))
    torch._foreach_add_(momenta, views, alpha=1.0 - mu)
    if group["nesterov"]:
        torch._foreach_lerp_(views, momenta, mu)
    else:
        torch._foreach_copy_(views, momenta)

    update = _direction(group, stack)
    if group["scale"] == "rms":
        norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
        factor = UPDATE_RMS * math.sqrt(n * m) / torch.where(norm > 0, norm, 1.0)
    else:
        factor = scale_factor(group["scale"], n, m)
    update.mul_(keep * -lr * factor)

    # Half-precision weights are updated in float32 and rounded once.
    targets = [p.to(dtype) for p in parameters]
    if group["weight_decay"]:
        amount = keep * lr * group["weight_decay"]
        if pieces[0].top_space is not None:
            torch._foreach_copy_(views, targets)  # the stack is free again
            _decay_top(stack, pieces, amount, bad)
            torch._foreach_copy_(targets, views)
        else:
            torch._foreach_mul_(targets, 1.0 - amount)
    torch._foreach_add_(targets, _views(update, parameters, counts))
    for p, target in zip(parameters, targets, strict=True):
        if target is not p:
            p.copy_(target)


def _direction(group: dict[str, Any], stack: Tensor) -> Tensor:
    """Steepest descent in the group's norm for every matrix of a stack."""
    vectors = 1 in stack.shape[-2:]  # the same in all norms, and exact without an iteration
    p = schatten_exponent(group["norm"])
    if p < math.inf and not vectors:
        return schatten_direction(stack, p)
    return msign(
        stack,
        method="auto" if vectors else group["method"],
        steps=group["ns_steps"],
        coefficients=group["coefficients"],
        dtype=None if group["ns_dtype"] is None else getattr(torch, group["ns_dtype"]),
    )


def _views(stack: Tensor, shaped_like: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The stack's matrices, parameter by parameter, in each parameter's shape."""
    return [part.view(p.shape) for part, p in zip(stack.split(counts), shaped_like, strict=True)]


def _decay_top(weights: Tensor, pieces: list[Piece], amount: Tensor, bad: Tensor) -> None:
    """Spectral weight decay of a (matrices, n, m) stack, in place; the vectors move with it unless the step is bad."""
    states = [piece.top_space for piece in pieces if piece.top_space is not None]
    assert len(states) == len(pieces)
    old = torch.cat(states)
    V = torch.where(bad, old, follow_top_space(weights, old))
    spectral_decay_(weights, V, amount)
    torch._foreach_copy_(states, list(V.split([len(state) for state in states])))
