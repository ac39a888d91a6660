"""Which rows go where: slots sorted by expert, and the products that suit their number.

A slot is one (token, choice) pair. Three ways to multiply the rows of every expert by its own matrix, for all that the
kernels of :mod:`quintic.moe.expert_kernels` do not compute (they take float32 on a CPU that has them):

=========  ==============================================================  =====================================
kernel     what it does                                                    costs
=========  ==============================================================  =====================================
loop       one matrix product per expert, into given memory                a call per expert
padded     one batched product, every expert padded to the fullest one     products with zeros
grouped    torch's grouped product over ragged groups                      a new array, strides of 16 bytes
=========  ==============================================================  =====================================

A GPU takes the grouped product where it is legal. Elsewhere consecutive experts of like load form runs: a run of
several experts is padded, a run of one is a turn of the loop. The choice is a pure function of sizes, load, dtype and
device capability, never of a timing or the number of threads, so that a resumed run repeats it. Results agree up to
the rounding of a matrix product.

Legend: n tokens, k choices, m = n k slots, r rows of the layout (slots and padding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Run", "blocks_of", "grouped_is_legal", "kept_rows", "lay_out", "plan_runs"]

# In multiply-adds that a CPU does in the same time: what a call costs from here, the threads' wait for each other
# included, in a forward and a backward pass together; and reading or writing an element of memory.
_CALL = 10_000_000
_MOVE = 20

_BLOCK_ROWS = 2048  # of a CPU's scratch: a megabyte to some ten


class Run(NamedTuple):
    """Consecutive experts whose rows are multiplied in one call."""

    first: int
    last: int
    """One past the last expert."""
    start: int
    """Its first row of the layout."""
    size: int
    """Rows per expert, padding included."""

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + (self.last - self.first) * self.size


class Block(NamedTuple):
    """Consecutive runs that share a scratch."""

    start: int
    stop: int
    """Rows of the layout."""
    runs: list[Run]


def grouped_is_legal(dtype: torch.dtype, widths: tuple[int, ...], device: torch.device) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes matrices of these widths here.

    It wants rows of a multiple of 16 bytes, no float64, and compute capability 8 on CUDA.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(width * dtype.itemsize % 16 for width in widths):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"


def kept_rows(slots: int, num_experts: int) -> int:
    """Rows that runs never exceed, whatever the load: an eighth of padding, and eight rows for each expert."""
    return slots + slots // 8 + 8 * num_experts


def plan_runs(counts: list[int], width_in: int, width_out: int, *, cpu: bool) -> list[Run]:
    """Join neighbours as long as the padding costs less than the call that is saved; on a CPU an even number of them.

    Args:
        counts: Slots per expert.
        width_in: Columns of an expert's input matrix.
        width_out: Rows of it.
        cpu: Whether the tensors are on a CPU. Elsewhere a call costs more than any padding that fits.

    Returns:
        Runs that cover all experts, together at most :func:`kept_rows` rows. Experts without rows are runs of size 0.

    Example:
        >>> [run[:2] for run in plan_runs([8, 7, 9, 8], 64, 128, cpu=True)]  # few rows: one batched product
        [(0, 4)]
        >>> [run[:2] for run in plan_runs([200, 5, 6, 0, 5], 64, 128, cpu=True)]  # a full expert would pad the others
        [(0, 1), (1, 3), (3, 4), (4, 5)]
        >>> [run[:2] for run in plan_runs([2000, 1000, 2000], 64, 128, cpu=True)]  # much to do per call
        [(0, 1), (1, 2), (2, 3)]
    """
    per_row = width_in * width_out + _MOVE * (width_in + width_out)
    runs: list[Run] = []
    first = start = before = 0
    while first < len(counts):
        last, size, total = first + 1, counts[first], before + counts[first]
        for count in counts[last:]:
            experts, larger, total = last - first, max(size, count), total + count
            padding = larger * (experts + 1) - size * experts - count
            fits = start + larger * (experts + 1) <= kept_rows(total, last + 1)  # not all of it for the first
            worth = not cpu or (padding * per_row <= _CALL and (experts == 1 or larger * (experts + 1) <= _BLOCK_ROWS))
            if not (fits and worth and bool(size) == bool(count)):
                break
            last, size = last + 1, larger
        if cpu and last - first > 1 and (last - first) % 2:  # threads share a batch out whole
            last -= 1
            size = max(counts[first:last])
        runs.append(Run(first, last, start, size))
        first, start, before = last, runs[-1].stop, before + sum(counts[first:last])
    return runs


def lay_out(ids_nk: Tensor, counts_e: Tensor, runs: list[Run] | None) -> tuple[Tensor, Tensor]:
    """Sort slots by expert, ties in the order of tokens, and repeat an expert's first slot as its padding.

    Args:
        ids_nk: Expert of every slot.
        counts_e: Slots per expert.
        runs: From :func:`plan_runs`; None for the grouped product, which needs no padding.

    Returns:
        Token of every row, and (tokens, k) row of every slot.
    """
    slot_m = torch.argsort(ids_nk.reshape(-1), stable=True)
    m, device = slot_m.numel(), slot_m.device
    row_m, slot_r = torch.arange(m, device=device), slot_m
    if runs is not None and runs[-1].stop > m:
        sizes_e = torch.tensor([run.size for run in runs for _ in range(run.first, run.last)], device=device)
        first_e = counts_e.cumsum(0) - counts_e
        gap_e = sizes_e.cumsum(0) - sizes_e - first_e
        row_m += gap_e.repeat_interleave(counts_e, output_size=m)
        slot_r = slot_m[first_e.clamp_(max=m - 1)].repeat_interleave(sizes_e, output_size=runs[-1].stop)
        slot_r.index_copy_(0, row_m, slot_m)
    row_nk = torch.empty_like(slot_m).index_copy_(0, slot_m, row_m).view_as(ids_nk)
    return torch.div(slot_r, ids_nk.shape[1], rounding_mode="trunc"), row_nk


def blocks_of(runs: list[Run], *, cpu: bool) -> list[Block]:
    """Runs that share a scratch: on a CPU some thousand rows together, or one run alone."""
    limit = _BLOCK_ROWS if cpu else runs[-1].stop
    blocks, first = [], 0
    for at, run in enumerate(runs):
        start = runs[first].start
        if run.start > start and run.stop - start > limit:
            blocks.append(Block(start, run.start, runs[first:at]))
            first = at
    blocks.append(Block(runs[first].start, runs[-1].stop, runs[first:]))
    return blocks
