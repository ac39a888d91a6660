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

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quintic.core.operators import operator
from quintic.moe.balance import Balance, NoBalance
from quintic.moe.quantile import BINS, margin_histogram
from quintic.moe.replay import in_backward

if TYPE_CHECKING:
    from quintic.moe.router import Routing

__all__ = ["UNIT", "Meter"]

UNIT = 1e-9
_COUNTERS = ("counts", "histogram", "sums")
_MANY, _MANY_LOSSES = 1000, 100  # forward passes: more than anyone accumulates
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
        self.passes = 0
        """Forward passes since the last optimizer step, those of a compiled layer aside."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in _COUNTERS:
            counter = getattr(self, name)
            device = fn(counter).device  # but not its values: to_empty has none
            setattr(self, name, torch.zeros_like(counter, device=device) if counter.is_meta else counter.to(device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"losses": []}  # their graph belongs to this layer, not to its copy

    @property
    def counters(self) -> list[Tensor]:
        """All of them."""
        return [getattr(self, name) for name in _COUNTERS]

    def observe(self, balance: Balance, routing: Routing, mask_n: Tensor | None, rows: Sequence[int]) -> None:
        """Count one forward pass in training mode; see the layer for the arguments."""
        self.follow(routing.counts_e.device)  # fully_shard moves parameters and buffers alone
        again = in_backward()
        if not again:
            self._remind(balance)
            scores_ne = routing.scores_ne.detach()
            _counted(*self.counters, routing.counts_e, routing.biased_ne, scores_ne, mask_n, self.top_k)
        # A recomputation must build the same graph as the first time, but its loss is not a second one.
        loss = balance.loss(routing, mask_n, rows, self.counts)
        if loss is not None and not again:
            self.losses.append(loss)
            _loss_counted(self.sums, loss.detach())

    def follow(self, device: torch.device) -> None:
        """Start from 0 on this device, unless the counters are there."""
        if self.counts.device != device:
            for name in _COUNTERS:
                setattr(self, name, torch.zeros_like(getattr(self, name), device=device))

    def reset(self) -> None:
        """Start the next step."""
        for counter in self.counters:
            counter.zero_()
        self.losses.clear()
        self.passes = 0

    def _remind(self, balance: Balance) -> None:
        """A loop that forgets to balance trains on without any other sign of it."""
        if torch.compiler.is_compiling():
            return
        self.passes += 1
        if self.passes == _MANY and not isinstance(balance, NoBalance):
            warnings.warn(
                f"{_MANY} forward passes in training mode without balance_step(model), which moves the bias and "
                "reports the load: call it after every optimizer.step(), or give the layer balance=NoBalance()",
                stacklevel=3,
            )
        if len(self.losses) == _MANY_LOSSES:
            warnings.warn(
                f"{_MANY_LOSSES} auxiliary losses of one layer wait to be used and hold memory: "
                "loss = loss + aux_loss(model) after every forward pass",
                stacklevel=3,
            )


def _count_routing(
    counts: Tensor,
    histogram: Tensor,
    sums: Tensor,
    counts_e: Tensor,
    biased_ne: Tensor,
    scores_ne: Tensor,
    mask_n: Tensor | None,
    top_k: int,
) -> None:
    if in_backward():  # a compiled graph can ask only here
        return
    counts += counts_e
    if len(histogram):
        histogram += margin_histogram(biased_ne, top_k, mask_n)
    stride = max(1, scores_ne.shape[0] // _ENTROPY_TOKENS)
    some_ne = scores_ne[::stride]
    share_ne = some_ne / some_ne.sum(-1, keepdim=True).clamp(min=torch.finfo(some_ne.dtype).tiny)
    entropy_n = torch.special.entr(share_ne).sum(-1)
    if mask_n is None:
        _add_(sums[:2], entropy_n.sum(), entropy_n.shape[0])
    else:
        _add_(sums[:2], torch.where(mask_n[::stride], entropy_n, 0.0).sum(), mask_n[::stride].sum())


def _count_loss(sums: Tensor, loss: Tensor) -> None:
    if not in_backward():
        _add_(sums[2:], loss, 1)


def _add_(sums: Tensor, value: Tensor, number: Tensor | int) -> None:
    amount = (value.nan_to_num(0.0, 0.0, 0.0) / UNIT).round().long()
    sums += torch.stack([amount, torch.zeros_like(amount) + number])


# Operators, so that activation checkpointing and torch.compile see each as one (:mod:`quintic.moe.replay`).
_counted = operator(
    "count_routing(Tensor(a!) counts, Tensor(b!) histogram, Tensor(c!) sums, Tensor counts_e, Tensor biased,"
    " Tensor scores, Tensor? mask, int top_k) -> ()",
    _count_routing, lambda *arguments: None,
)  # fmt: skip
_loss_counted = operator("count_loss(Tensor(a!) sums, Tensor loss) -> ()", _count_loss, lambda *arguments: None)
