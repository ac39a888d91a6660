"""Which rows go where: slots sorted by expert, and the kernel that suits their number.

A slot is one (token, choice) pair. Three ways to multiply the rows of every expert by its own matrix:

=========  ==============================================================  =====================================
kernel     what it does                                                    costs
=========  ==============================================================  =====================================
loop       one matrix product per expert, into given memory                a call per expert
padded     one batched product, every expert padded to the fullest one     products with zeros
grouped    torch's grouped product over ragged groups                      a new array, strides of 16 bytes
=========  ==============================================================  =====================================

The choice is a pure function of sizes, load, dtype and device capability, never of a timing, so that a resumed
run repeats it. Results agree up to the rounding of a matrix product.

Legend: n tokens, k choices, m = n k slots, r rows of the layout (m, or experts times capacity when padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Layout", "choose_kernel", "grouped_is_legal", "lay_out"]

# In multiply-adds that one CPU core does in the same time: a product called from here (some 6 microseconds) and from
# within the grouped one, and reading or writing an element of memory.
_CALL = 300_000
_CALL_WITHIN = 100_000
_MOVE = 20

_BLOCK_ROWS = 1024  # of a CPU's scratch: a few hundred kilobytes to a few megabytes


class Block(NamedTuple):
    """Consecutive experts whose rows are worked on together."""

    first: int
    last: int
    """One past the last expert."""
    start: int
    stop: int
    """Rows of the layout."""
    sizes: list[int]
    """Rows per expert; all equal when padded."""


class Layout(NamedTuple):
    """Rows in the order of experts."""

    kernel: str
    token_r: Tensor
    """Token of every row; n for padding."""
    slot_r: Tensor
    """Slot of every row; m for padding."""
    real_m: Tensor | None
    """Rows that are not padding, when there is padding."""
    blocks: list[Block]


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


def choose_kernel(counts: list[int], width_in: int, width_out: int, *, cpu: bool, legal: bool) -> str:
    """The kernel for experts with these loads.

    On a CPU the smallest of three estimated costs beyond the useful products: calls for the loop; zeros and an array
    of its own for padding; fewer calls and an array of its own for the grouped product. Elsewhere a call per expert
    is the last resort.

    Args:
        counts: Slots per expert.
        width_in: Columns of an expert's input matrix.
        width_out: Rows of it.
        cpu: Whether the tensors are on a CPU.
        legal: Whether the grouped product is possible (:func:`grouped_is_legal`).

    Returns:
        ``loop``, ``padded`` or ``grouped``.

    Example:
        >>> choose_kernel([8, 7, 9, 8], 64, 128, cpu=True, legal=True)  # few rows: one batched product
        'padded'
        >>> choose_kernel([200, 5, 5, 5], 64, 128, cpu=True, legal=True)  # one full expert would pad all others
        'grouped'
        >>> choose_kernel([200, 5, 5, 5], 63, 127, cpu=True, legal=False)
        'loop'
        >>> choose_kernel([2000, 2000, 2000, 2000], 64, 128, cpu=True, legal=True)  # much to do per call
        'loop'
    """
    slots, fullest, busy = sum(counts), max(counts), sum(count > 0 for count in counts)
    padding, idle = len(counts) * fullest - slots, len(counts) - busy
    if not cpu:
        return "grouped" if legal else "padded" if padding <= slots else "loop"
    cost = {
        "loop": busy * _CALL,
        "padded": padding * (width_in * width_out + _MOVE * width_in)
        + idle * width_in * width_out * _MOVE
        + len(counts) * fullest * width_out * _MOVE,
    }
    if legal:
        cost["grouped"] = busy * _CALL_WITHIN + slots * width_out * _MOVE
    return min(cost, key=lambda name: cost[name])


def lay_out(slot_m: Tensor, counts: list[int], top_k: int, kernel: str) -> Layout:
    """Arrange slots that are sorted by expert.

    Args:
        slot_m: Slots in the order of experts, ties in the order of tokens.
        counts: Slots per expert.
        top_k: Slots per token.
        kernel: From :func:`choose_kernel`.
    """
    m = slot_m.numel()
    if kernel == "padded":
        experts, fullest = len(counts), max(counts)
        counts_e = torch.tensor(counts, device=slot_m.device)
        gap_e = torch.arange(experts, device=slot_m.device) * fullest - (counts_e.cumsum(0) - counts_e)
        place = torch.arange(m, device=slot_m.device)
        real_m = place + gap_e.repeat_interleave(counts_e, output_size=m)
        slot_r = slot_m.new_full((experts * fullest,), m).index_copy_(0, real_m, slot_m)
        blocks = [Block(0, experts, 0, experts * fullest, [fullest] * experts)]
        return Layout(kernel, slot_r // top_k, slot_r, real_m, blocks)
    limit = _BLOCK_ROWS if kernel == "loop" and slot_m.device.type == "cpu" else m
    return Layout(kernel, slot_m // top_k, slot_m, None, _blocks(counts, limit))


def _blocks(counts: list[int], limit: int) -> list[Block]:
    """Runs of experts with at most ``limit`` rows together, or one expert alone."""
    blocks: list[Block] = []
    first = start = stop = 0
    for expert, count in enumerate(counts):
        if stop > start and stop + count - start > limit:
            blocks.append(Block(first, expert, start, stop, counts[first:expert]))
            first, start = expert, stop
        stop += count
    blocks.append(Block(first, len(counts), start, stop, counts[first:]))
    return blocks
