"""Products of the rows of every expert with its own matrix, by any of the kernels of :mod:`quintic.moe.dispatch`.

    rows:   out[rows of e] = x[rows of e] w[e]            outer:   out[e] = a[rows of e]' b[rows of e]

Legend: r rows of a block, sorted by expert; i and o widths in and out; e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quintic.moe.dispatch import Block, Run

__all__ = ["outer_by_expert_", "rows_by_expert_"]


def rows_by_expert_(block: Block, ends_e: Tensor | None, x_ri: Tensor, w_eio: Tensor, out_ro: Tensor) -> Tensor:
    """x[rows of e] @ w[e] for every expert: in ``out_ro``, or in a new array by the grouped product.

    Args:
        block: Rows and the runs that they form.
        ends_e: For the grouped product: one past the last row of each expert.
        x_ri: (rows of the block, width in).
        w_eio: (all experts, width in, width out).
        out_ro: (rows of the block, width out), may be written.
    """
    if ends_e is not None:
        return F.grouped_mm(x_ri, w_eio, offs=ends_e)
    for run in block.runs:
        first, last = run.first, run.last
        if last - first > 1 and run.size:
            torch.bmm(_rows(x_ri, run, block), w_eio[first:last], out=_rows(out_ro, run, block))
        elif run.size:
            here = slice(run.start - block.start, run.stop - block.start)
            torch.mm(x_ri[here], w_eio[first], out=out_ro[here])
    return out_ro


def outer_by_expert_(block: Block, ends_e: Tensor | None, a_ro: Tensor, b_ri: Tensor, out_eoi: Tensor) -> Tensor:
    """a[rows of e]' @ b[rows of e] for the experts of the block; exact zeros for an expert without rows.

    Returns ``out_eoi``, written for these experts, or a new array by the grouped product.

    Args:
        block: Rows and the runs that they form.
        ends_e: For the grouped product: one past the last row of each expert.
        a_ro: (rows of the block, width out).
        b_ri: (rows of the block, width in).
        out_eoi: (all experts, width out, width in).
    """
    if ends_e is not None:
        return F.grouped_mm(a_ro.t(), b_ri, offs=ends_e)
    for run in block.runs:
        first, last = run.first, run.last
        if not run.size:
            out_eoi[first:last].zero_()
        elif last - first > 1:
            torch.bmm(_rows(a_ro, run, block).transpose(1, 2), _rows(b_ri, run, block), out=out_eoi[first:last])
        else:
            here = slice(run.start - block.start, run.stop - block.start)
            torch.mm(a_ro[here].t(), b_ri[here], out=out_eoi[first])
    return out_eoi


def _rows(x_ri: Tensor, run: Run, block: Block) -> Tensor:
    return x_ri[run.start - block.start : run.stop - block.start].view(run.last - run.first, run.size, -1)
