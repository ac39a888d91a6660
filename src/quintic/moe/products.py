"""Products of the rows of every expert with its own matrix, by any of the kernels of :mod:`quintic.moe.dispatch`.

    rows:   out[rows of e] = x[rows of e] w[e]            outer:   out[e] = a[rows of e]' b[rows of e]

Legend: r rows, sorted by expert; i and o widths in and out; e experts of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quintic.moe.dispatch import Block

__all__ = ["outer_by_expert_", "rows_by_expert_"]


def rows_by_expert_(kernel: str, block: Block, x_ri: Tensor, w_eio: Tensor, out_ro: Tensor) -> Tensor:
    """x[rows of e] @ w[e] for every expert: in ``out_ro``, or in a new array if the kernel makes one.

    Args:
        kernel: ``loop``, ``padded`` or ``grouped``.
        block: Experts and rows.
        x_ri: (rows of the block, width in).
        w_eio: (all experts, width in, width out).
        out_ro: (rows of the block, width out), may be written.
    """
    w_eio = w_eio[block.first : block.last]
    if kernel == "padded":
        torch.bmm(_by_expert(x_ri, block), w_eio, out=_by_expert(out_ro, block))
    elif kernel == "grouped":
        return F.grouped_mm(x_ri, w_eio, offs=_ends(block, x_ri))
    else:
        for size, x, w, out in zip(
            block.sizes, x_ri.split(block.sizes), w_eio.unbind(0), out_ro.split(block.sizes), strict=True
        ):
            if size:
                torch.mm(x, w, out=out)
    return out_ro


def outer_by_expert_(kernel: str, block: Block, a_ro: Tensor, b_ri: Tensor, out_eoi: Tensor) -> Tensor:
    """a[rows of e]' @ b[rows of e] for the experts of the block; exact zeros for an expert without rows.

    Returns ``out_eoi``, written for these experts, or a new array if the kernel makes one.

    Args:
        kernel: ``loop``, ``padded`` or ``grouped``.
        block: Experts and rows.
        a_ro: (rows of the block, width out).
        b_ri: (rows of the block, width in).
        out_eoi: (all experts, width out, width in).
    """
    here_eoi = out_eoi[block.first : block.last]
    if kernel == "padded":
        torch.bmm(_by_expert(a_ro, block).transpose(1, 2), _by_expert(b_ri, block), out=here_eoi)
    elif kernel == "grouped":
        return F.grouped_mm(a_ro.t(), b_ri, offs=_ends(block, a_ro))
    else:
        for size, a, b, out in zip(
            block.sizes, a_ro.split(block.sizes), b_ri.split(block.sizes), here_eoi.unbind(0), strict=True
        ):
            if size:
                torch.mm(a.t(), b, out=out)
            else:
                out.zero_()
    return out_eoi


def _by_expert(x_ri: Tensor, block: Block) -> Tensor:
    return x_ri.unflatten(0, (len(block.sizes), -1))


def _ends(block: Block, like: Tensor) -> Tensor:
    return torch.tensor(block.sizes, device=like.device).cumsum(0).to(torch.int32)
