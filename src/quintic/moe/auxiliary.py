"""Auxiliary losses: any loss of the load, made differentiable by a straight-through proxy.

Post: https://kexue.fm/archives/10735. With rho the router's scores of a token,

    p_i = rho_i / sum rho,   P = mean of p over tokens;     f_i = 1/k if chosen else 0,   F = mean of f

The load F is what should equal the target Q, and has no gradient; P has one and follows F. So write any loss of F and
put the straight-through P + sg[F - P] in its place: the *value* is that of F, the *gradient* goes through P.

=========  ==========================================  ==================================================
kind       value                                       gradient through P
=========  ==========================================  ==================================================
squared    n/2 ||F - Q||^2                             n (F - Q) . grad P
entropy    sum F log(F / Q)                            log(F / Q) . grad P   (as grad sum P = 0)
usual      n/2 ||F - Q||^2                             n F . grad P: that of the usual n F.P
callable   your function of F                          its gradient at F, times grad P
=========  ==========================================  ==================================================

``usual`` equals ``squared`` where sum P = 1 and Q is uniform, since then Q . grad P = 0, and is refused elsewhere.
The value of F.P itself is not a measure of balance (it is 1/n at F = P = Q, and that is not its minimum), so it is
not the value reported here: all three built-in values are 0 at F = Q and positive elsewhere.

The factor n makes weights comparable with those of the literature, whose loss is n F.P, 1 at balance. (transformers
does not divide f by k: its loss is k times larger.) The three built-in gradients agree to first order at balance.
``entropy`` counts half a choice more for every expert, so that one without tokens has a finite, strong pull.

A loss belongs to one layer. Pooled over layers, opposite collapses cancel: two layers that send everything to
different halves of the experts look perfectly balanced together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from quintic.core import ConfigError, suggest
from quintic.moe.balance import Balance, check_target
from quintic.moe.replay import in_backward

if TYPE_CHECKING:
    from quintic.moe.router import Routing

__all__ = ["AuxLoss", "ZLoss", "straight_through"]

_KINDS = ("squared", "entropy", "usual")
_OVER = ("batch", "sequence", "global")


def straight_through(load: Tensor, proxy: Tensor) -> Tensor:
    """P + sg[F - P]: the value of the load with the gradient of the proxy.

    Args:
        load: F, any shape.
        proxy: P, the same shape, with a graph.

    Example:
        >>> proxy = torch.tensor([0.25, 0.75], requires_grad=True)
        >>> load = straight_through(torch.tensor([1.0, 0.0]), proxy)
        >>> (load - 0.5).square().sum().mul(0.5).backward()
        >>> load.tolist(), proxy.grad.tolist()  # F, and F - Q
        ([1.0, 0.0], [0.5, -0.5])
    """
    return proxy + (load - proxy).detach()


@dataclass(frozen=True)
class AuxLoss(Balance):
    """A loss of the load, added to the model's loss: ``loss = loss + aux_loss(model)``.

    Args:
        weight: Factor of the loss; 1e-4 to 1e-1 in the literature.
        kind: ``squared``, ``entropy`` or ``usual`` (the table above), or a function from loads (..., groups) to
            losses (...). A function sees no factor n.
        over: What F and P are means of: a ``batch`` (one forward pass of this process), every ``sequence`` apart
            (the mean of their losses), or, for F alone, the ``global`` batch: all micro-batches since the last
            optimizer step so far, over all ranks.
        target: Q, one positive share per expert with sum 1; None is uniform.
        normalized: False takes P = mean of rho itself, which need not have sum 1.
        groups: Balance this many equal groups of consecutive experts, e.g. those on one device, instead of experts;
            0 for experts.
        group: Process group of ``global``; None is all processes.

    Raises:
        ConfigError: A value out of range, ``usual`` with a target or unnormalised scores, a function with a target.
    """

    weight: float = 0.01
    kind: str | Callable[[Tensor], Tensor] = "squared"
    over: str = "batch"
    target: tuple[float, ...] | None = None
    normalized: bool = True
    groups: int = 0
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, str) or not (self.weight >= 0.0 and math.isfinite(self.weight)):
            raise ConfigError(f"the weight of the auxiliary loss must be a finite number >= 0, found {self.weight!r}")
        if isinstance(self.kind, str) and self.kind not in _KINDS:
            raise ConfigError(f"unknown auxiliary loss {self.kind!r}{suggest(self.kind, _KINDS)}")
        if self.over not in _OVER:
            raise ConfigError(f"over = {self.over!r} is unknown{suggest(self.over, _OVER)}")
        if self.kind == "usual" and (self.target is not None or not self.normalized):
            raise ConfigError(
                "the usual F.P balances a uniform target by normalised scores only, since it leaves out Q.P; "
                'kind="squared" has the gradient of (F - Q).P and takes any target and scores'
            )
        if callable(self.kind) and self.target is not None:
            raise ConfigError("a loss of your own has no other target than its own; leave out target=")
        if self.groups < 0:
            raise ConfigError(f"groups must be at least 0, found {self.groups}")

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ConfigError if target or groups do not fit the layer."""
        check_target(self.target, num_experts)
        if self.groups and num_experts % self.groups:
            raise ConfigError(f"{num_experts} experts do not divide into {self.groups} equal groups")

    def loss(self, routing: Routing, mask_n: Tensor | None, rows: Sequence[int], counts_e: Tensor) -> Tensor | None:
        """weight * loss(P + sg[F - P]); 0 without tokens. None in a recomputation of a global one, which has no use."""
        if self.over != "global" or torch.compiler.is_compiling():
            return self._loss(routing, mask_n, rows, counts_e)
        # By the time of a recomputation more may have been counted, and its gradient would be that of another F. So
        # activation checkpointing keeps of this loss what autograd wants, and what it computes again is not used.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            loss = self._loss(routing, mask_n, rows, counts_e)
        return None if in_backward() else loss

    def _loss(self, routing: Routing, mask_n: Tensor | None, rows: Sequence[int], counts_e: Tensor) -> Tensor:
        scores_ne = routing.scores_ne
        experts = scores_ne.shape[1]
        # s sequences of t tokens; the batch is one long sequence.
        sequences = 1
        if self.over == "sequence":
            if len(rows) < 2:
                raise ConfigError(
                    'over="sequence" needs tokens of shape (batch, time, width); this batch has no time axis'
                )
            sequences = math.prod(rows[:-1])
        mask_n = torch.ones_like(scores_ne[:, 0], dtype=torch.bool) if mask_n is None else mask_n
        mask_st1 = mask_n.reshape(sequences, -1, 1)
        if self.normalized:
            total_n1 = scores_ne.sum(-1, keepdim=True)
            # All scores of a token may be zero (ReLU): then it says nothing.
            scores_ne = scores_ne / torch.where(total_n1 > 0, total_n1, torch.ones_like(total_n1))
        tokens_s1 = mask_st1.sum(1)
        p_se = torch.where(mask_st1, scores_ne.reshape(sequences, -1, experts), 0.0).sum(1) / tokens_s1.clamp(min=1)
        if self.over == "global":
            counts_se = _all_reduced(counts_e, self.group).unsqueeze(0)
        else:
            chosen_sm = routing.ids_nk.reshape(sequences, -1)
            counts_se = torch.zeros(sequences, experts, dtype=torch.int64, device=chosen_sm.device)
            counts_se.scatter_add_(1, chosen_sm, mask_st1.expand(-1, -1, routing.ids_nk.shape[1]).flatten(1).long())
        choices_s1 = counts_se.sum(1, keepdim=True)
        f_se = counts_se.to(p_se.dtype) / choices_s1.clamp(min=1)
        q_e = torch.full_like(p_se[0], 1.0 / experts) if self.target is None else p_se.new_tensor(self.target)
        if self.groups:
            p_se, f_se, q_e = (each.unflatten(-1, (self.groups, -1)).sum(-1) for each in (p_se, f_se, q_e))
        loss_s = self._of_load(f_se, p_se, q_e, choices_s1)
        some_s = (tokens_s1 > 0).squeeze(1)
        return self.weight * torch.where(some_s, loss_s, 0.0).sum() / some_s.sum().clamp(min=1)

    def _of_load(self, f_sg: Tensor, p_sg: Tensor, q_g: Tensor, choices_s1: Tensor) -> Tensor:
        n = q_g.shape[0]
        load_sg = straight_through(f_sg, p_sg)
        if callable(self.kind):
            loss_s = self.kind(load_sg)
            if loss_s.shape != load_sg.shape[:-1]:
                raise ConfigError(
                    f"the loss of your own returned shape {tuple(loss_s.shape)} for loads {tuple(load_sg.shape)}; "
                    "expected one number per row, as by .sum(-1)"
                )
            return loss_s
        if self.kind == "squared":
            return 0.5 * n * (load_sg - q_g).square().sum(-1)
        if self.kind == "usual":
            shortcut_s = n * (f_sg * p_sg).sum(-1)
            return shortcut_s + (0.5 * n * (f_sg - q_g).square().sum(-1) - shortcut_s).detach()
        half_sg = 0.5 * n * q_g / choices_s1.clamp(min=1)
        smooth_sg = (load_sg + half_sg) / (1.0 + half_sg.sum(-1, keepdim=True))
        return (smooth_sg * (smooth_sg / q_g).log()).sum(-1)


@dataclass(frozen=True)
class ZLoss(Balance):
    """weight * mean of logsumexp(logits)^2: keeps the router's logits small (ST-MoE, arXiv 2202.08906).

    Args:
        weight: Factor; 1e-3 in the paper.
    """

    weight: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.weight >= 0.0 and math.isfinite(self.weight)):
            raise ConfigError(f"the weight of the z-loss must be a finite number >= 0, found {self.weight}")

    def loss(self, routing: Routing, mask_n: Tensor | None, rows: Sequence[int], counts_e: Tensor) -> Tensor | None:
        """The mean over the tokens that are not padding; 0 without tokens."""
        square_n = routing.logits_ne.logsumexp(-1).square()
        if mask_n is None:
            return self.weight * square_n.sum() / max(1, square_n.shape[0])
        return self.weight * torch.where(mask_n, square_n, 0.0).sum() / mask_n.sum().clamp(min=1)


def _all_reduced(counts_e: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    counts_e = counts_e.clone()
    if dist.is_available() and dist.is_initialized() and not in_backward():
        dist.all_reduce(counts_e, group=group)
    return counts_e
