"""What one layer counts between two optimizer steps.

All counters are integers, so that micro-batches and ranks add up exactly and in any order: counts of tokens (float32
would stop counting at 2^24), and sums of real numbers in units of 1e-9. Counting happens in the forward pass of a layer
in training mode, but not inside a backward pass, where activation checkpointing of either kind runs the forward pass
a second time: so a token counts once. Evaluation does not count. ``torch.no_grad`` alone does: the first pass of a
reentrant checkpoint is one without gradients.

The counters are not part of a checkpoint: right after :func:`~quintic.moe.balance_step`, where checkpoints are written,
they are all zero. Until then they differ between ranks. So they are plain tensors and no buffers, which
``DistributedDataParallel`` would overwrite by those of rank 0 before every forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quintic.moe.balance import Balance
from quintic.moe.quantile import BINS, margin_histogram
from quintic.moe.replay import if_first, in_backward

if TYPE_CHECKING:
    from quintic.moe.router import Routing

__all__ = ["UNIT", "Meter"]

UNIT = 1e-9
_COUNTERS = ("counts", "histogram", "sums")
_ENTROPY_TOKENS = 256  # of a forward pass: an estimate, since all of them would cost as much as the router


class Meter(nn.Module):
    """Counters of one layer.

    Args:
        num_experts: E.
        top_k: k.
        balance: Decides whether margins are counted.
    """

    counts: Tensor
    """(experts,) choices per expert, padding excluded."""
    histogram: Tensor
    """(experts, BINS) margins for the quantile rule; (0, BINS) if no rule reads them."""
    sums: Tensor
    """(4,): entropy of the scores (in UNIT nats) and its tokens; auxiliary loss (in UNIT) and its forward passes."""

    def __init__(self, num_experts: int, top_k: int, balance: Balance) -> None:
        super().__init__()
        self.top_k = top_k
        rows = num_experts if balance.wants_histogram else 0
        for name, shape in zip(_COUNTERS, ((num_experts,), (rows, BINS), (4,)), strict=True):
            setattr(self, name, torch.zeros(shape, dtype=torch.int64))
        self.losses: list[Tensor] = []
        """Auxiliary losses with their graphs, until ``aux_loss`` collects them."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in _COUNTERS:
            setattr(self, name, fn(getattr(self, name)))
        return self

    @property
    def counters(self) -> list[Tensor]:
        """All of them."""
        return [getattr(self, name) for name in _COUNTERS]

    def observe(self, balance: Balance, routing: Routing, mask_n: Tensor | None, rows: Sequence[int]) -> None:
        """Count one forward pass in training mode; see the layer for the arguments."""
        device = routing.counts_e.device
        if self.counts.device != device:  # fully_shard, or a load with assign=True, move parameters and buffers alone
            for name in _COUNTERS:
                setattr(self, name, torch.zeros_like(getattr(self, name), device=device))
        again = in_backward()
        if not again:
            with torch.no_grad():
                self.counts += if_first(routing.counts_e)
                if len(self.histogram):
                    self.histogram += if_first(margin_histogram(routing.biased_ne, self.top_k, mask_n))
                self._add_entropy(routing.scores_ne.detach(), mask_n)
        # A recomputation must build the same graph as the first time, but its loss is not a second one.
        loss = balance.loss(routing, mask_n, rows, self.counts)
        if loss is not None and not again:
            self.losses.append(loss)
            self._add(2, loss.detach(), 1)

    def reset(self) -> None:
        """Start the next step."""
        for counter in self.counters:
            counter.zero_()
        self.losses.clear()

    def _add_entropy(self, scores_ne: Tensor, mask_n: Tensor | None) -> None:
        stride = max(1, scores_ne.shape[0] // _ENTROPY_TOKENS)
        some_ne = scores_ne[::stride]
        share_ne = some_ne / some_ne.sum(-1, keepdim=True).clamp(min=torch.finfo(some_ne.dtype).tiny)
        entropy_n = torch.special.entr(share_ne).sum(-1)
        if mask_n is None:
            self._add(0, entropy_n.sum(), entropy_n.shape[0])
        else:
            self._add(0, torch.where(mask_n[::stride], entropy_n, 0.0).sum(), mask_n[::stride].sum())

    def _add(self, at: int, value: Tensor, number: Tensor | int) -> None:
        amount = (value.nan_to_num(0.0, 0.0, 0.0) / UNIT).round().long()
        self.sums[at : at + 2] += if_first(torch.stack([amount, torch.zeros_like(amount) + number]))
