"""Balancing the load of experts: what a balancer can do, and loss-free balance by a bias that only selects.

Post: https://kexue.fm/archives/10757, after DeepSeek's arXiv 2408.15664. The layer is

    y = sum over i in argtop_k(rho + b) of rho_i e_i

so b decides who is chosen and never how much the choice weighs. With F the realised share of each expert
and Q the target (uniform unless given), the straight-through loss 1/2 ||b + sg[F - b] - Q||^2 has the gradient
F - Q, and b takes a step against it after the batch that used it:

=============  =====================================================  ==========================================
rule           step                                                   source
=============  =====================================================  ==========================================
sign           b -= u sign(F - Q)                                     arXiv 2408.15664
sgd            b -= u (F - Q)                                         the post
relative       b -= u (F / Q - 1)                                     n times sgd for a uniform target
rms            b -= u (F - Q) / RMS(F - Q)                            the post; no step at F = Q
floored-rms    b -= u (F - Q) / max(RMS(F - Q), c sigma, u Q / g)     here: sigma is the sampling noise of F
quantile       b -= u cut, where the share k Q of the tokens would    the posts 11619 and 11626, with the midpoint
               choose the expert; no unit of score in u <= 1          cutoff (:mod:`quintic.moe.quantile`)
=============  =====================================================  ==========================================

sign and rms keep a constant step size near balance and oscillate when u is large. floored-rms walks like rms far from
balance and slows down near it: where F - Q is only sampling noise (c = 8), and where the step would overshoot, since it
never exceeds that of ``relative`` at the rate g = 0.03, which is stable with a margin of 3 for sigmoid scores. So u is
a speed limit that may be large: on a simulated router any u from 0.001 to 0.3 ends near the sampling floor
(``benchmarks/balance_rules.py``). The mean of the step is removed, since a common shift of b selects nothing and
would let b drift.

A balancer is a small frozen object without state: the state is the router's bias, which checkpoints hold, and the
layer's :class:`~quintic.moe.meter.Meter`, which one optimizer step fills and empties. Balancers add up:
``LossFree("sign") + AuxLoss(1e-4, over="sequence")`` is what DeepSeek-V3 trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.moe.quantile import quantile_cut

if TYPE_CHECKING:
    from quintic.moe.router import Routing

__all__ = ["RATES", "RULES", "Balance", "Combination", "LossFree", "NoBalance", "check_target"]

RATES = {"sign": 0.001, "sgd": 0.3, "relative": 0.03, "rms": 0.001, "floored-rms": 0.03, "quantile": 0.3}
"""Rules and the rate that each has if none is given; for sigmoid scores."""
RULES = tuple(RATES)

_NOISE_FLOOR = 8.0
_LARGEST_GAIN = 0.03


class Balance:
    """What the layer asks of a balancer; every answer of this base is "nothing to do"."""

    @property
    def wants_histogram(self) -> bool:
        """Whether :meth:`step` reads the histogram of margins."""
        return False

    @property
    def rate_is_for_sigmoid(self) -> bool:
        """Whether the bias moves at a rate that nobody chose, which supposes scores like those of a sigmoid."""
        return False

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ConfigError if the balancer does not fit a layer of this shape."""

    def shift(self, rows: Sequence[int], top_k: int, mask_n: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """What to add to scores (tokens, experts) for the selection only, beside the bias; None for nothing.

        Args:
            rows: The shape of the tokens; its last axis runs along a sequence.
            top_k: Choices per token.
            mask_n: (tokens,) bool; False is padding. None counts every token.
        """

    def loss(self, routing: Routing, mask_n: Tensor | None, rows: Sequence[int], counts_e: Tensor) -> Tensor | None:
        """An auxiliary loss with a graph, weighted; None for none.

        Args:
            routing: What the router decided.
            mask_n: (tokens,) bool; False is padding. None counts every token.
            rows: The shape of the tokens; its last axis runs along a sequence.
            counts_e: (experts,) choices since the last optimizer step, these included.
        """

    def step(
        self,
        bias_e: Tensor,
        counts_e: Tensor,
        top_k: int,
        *,
        histogram_eb: Tensor | None = None,
        progress: float | None = None,
    ) -> None:
        """Move the bias, in place, after the step whose counts these are. All tensors are on the CPU.

        Args:
            bias_e: (experts,) float32.
            counts_e: (experts,) integers, summed over micro-batches and ranks.
            top_k: Choices per token.
            histogram_eb: Margins of the same tokens, if :attr:`wants_histogram`.
            progress: Part of the training done, 0 to 1; None if unknown.
        """

    def __add__(self, other: Balance) -> Combination:
        if not isinstance(other, Balance):
            return NotImplemented
        parts = [part for each in (self, other) for part in (each.parts if isinstance(each, Combination) else (each,))]
        return Combination(tuple(parts))


@dataclass(frozen=True)
class NoBalance(Balance):
    """Leave the router alone: the bias stays as it is."""


@dataclass(frozen=True)
class LossFree(Balance):
    """Balance by a selection bias.

    Args:
        rule: One of :data:`RULES`.
        rate: u, in units of the router's score (for ``quantile``: the part of the way to go, at most 1). None is
            the rule's own, see :data:`RATES`.
        target: Q, one share per expert, positive, with sum 1; None is uniform.
        warmup: Part of the training over which the rate rises from 0.
        rest: Part at the end of the training in which the bias rests; DeepSeek-V3's last 500B of 14.8T tokens are
            0.034. Either of the two needs ``balance_step(model, progress=...)``.

    Raises:
        ConfigError: Unknown rule, a rate, target or schedule out of range.

    Example:
        >>> bias = torch.zeros(4)
        >>> LossFree("sign", rate=0.5).step(bias, torch.tensor([6, 2, 2, 2]), top_k=2)
        >>> bias.tolist()
        [-0.75, 0.25, 0.25, 0.25]
    """

    rule: str = "floored-rms"
    rate: float | None = None
    target: tuple[float, ...] | None = None
    warmup: float = 0.0
    rest: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"unknown balancing rule {self.rule!r}{suggest(self.rule, RULES)}")
        if self.rate is not None and not (self.rate >= 0.0 and math.isfinite(self.rate)):
            raise ConfigError(f"balancing rate must be a finite number >= 0, found {self.rate}")
        if self.rule == "quantile" and self.rate is not None and self.rate > 1.0:
            raise ConfigError(f"the rate of the quantile rule is a part of the way: at most 1, found {self.rate}")
        if not (self.warmup >= 0.0 and self.rest >= 0.0 and self.warmup + self.rest <= 1.0):
            raise ConfigError(
                "warmup and rest are parts of the training, at least 0 and together at most 1, "
                f"found {self.warmup} and {self.rest}"
            )

    @property
    def wants_histogram(self) -> bool:
        """True for the quantile rule."""
        return self.rule == "quantile"

    @property
    def rate_is_for_sigmoid(self) -> bool:
        """True without a rate, except for the quantile rule, which has no unit of score."""
        return self.rate is None and self.rule != "quantile"

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise ConfigError if the target does not fit the layer."""
        check_target(self.target, num_experts)
        if self.target is not None and top_k * max(self.target) > 1.0:
            raise ConfigError(
                f"a target share of {max(self.target)} cannot be reached: an expert is chosen at most once per token, "
                f"which is 1/{top_k} of the choices"
            )

    def step(
        self,
        bias_e: Tensor,
        counts_e: Tensor,
        top_k: int,
        *,
        histogram_eb: Tensor | None = None,
        progress: float | None = None,
    ) -> None:
        """Move the bias by the rule; nothing happens without tokens or at F = Q."""
        counts = counts_e.cpu().double()  # a handful of numbers, and not every device has float64
        total = counts.sum()
        if total == 0:
            return
        experts = counts.numel()
        target = _shares(self.target, experts)
        excess = counts / total - target
        rate = (RATES[self.rule] if self.rate is None else self.rate) * self._schedule(progress)
        rms = excess.square().mean().sqrt()
        if self.rule == "quantile":
            assert histogram_eb is not None
            direction = quantile_cut(histogram_eb.cpu(), top_k * target)
        elif rms == 0:
            return
        elif self.rule == "sign":
            direction = excess.sign()
        elif self.rule == "sgd":
            direction = excess
        elif self.rule == "relative":
            direction = excess / target
        elif self.rule == "rms":
            direction = excess / rms
        else:
            # Standard deviation of a share when tokens choose independently and in balance.
            share = top_k * target
            noise = (share * (1.0 - share)).mean().clamp(min=0.0).sqrt() / (total * top_k).sqrt()
            direction = excess / (rate / _LARGEST_GAIN * target).clamp(min=max(rms, _NOISE_FLOOR * noise))
        bias_e -= (rate * (direction - direction.mean())).to(bias_e.device, bias_e.dtype)

    def _schedule(self, progress: float | None) -> float:
        if not (self.warmup or self.rest):
            return 1.0
        if progress is None:
            raise ConfigError("LossFree has a warmup or rest: call balance_step(model, progress=part of training done)")
        if progress >= 1.0 - self.rest:
            return 0.0
        return min(1.0, progress / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class Combination(Balance):
    """Several balancers at work on one layer; made by adding them.

    Raises:
        ConfigError: Two of them want to move the bias.
    """

    parts: tuple[Balance, ...]

    def __post_init__(self) -> None:
        if sum(isinstance(part, LossFree) for part in self.parts) > 1:
            raise ConfigError("two LossFree rules would both move the one bias of the router; keep one")

    @property
    def wants_histogram(self) -> bool:
        """Whether a part does."""
        return any(part.wants_histogram for part in self.parts)

    @property
    def rate_is_for_sigmoid(self) -> bool:
        """Whether that of a part is."""
        return any(part.rate_is_for_sigmoid for part in self.parts)

    def check(self, num_experts: int, top_k: int) -> None:
        """Check every part."""
        for part in self.parts:
            part.check(num_experts, top_k)

    def shift(self, rows: Sequence[int], top_k: int, mask_n: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
        """The sum of the parts' shifts."""
        # Plain loops here and below: torch.compile does not take a := in a comprehension.
        shifts = [part.shift(rows, top_k, mask_n) for part in self.parts]
        found = [shift for shift in shifts if shift is not None]
        if len(found) <= 1:
            return found[0] if found else None
        return lambda scores_ne: torch.stack([shift(scores_ne) for shift in found]).sum(0)

    def loss(self, routing: Routing, mask_n: Tensor | None, rows: Sequence[int], counts_e: Tensor) -> Tensor | None:
        """The sum of the parts' losses."""
        losses = [part.loss(routing, mask_n, rows, counts_e) for part in self.parts]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    def step(
        self,
        bias_e: Tensor,
        counts_e: Tensor,
        top_k: int,
        *,
        histogram_eb: Tensor | None = None,
        progress: float | None = None,
    ) -> None:
        """Every part's step."""
        for part in self.parts:
            part.step(bias_e, counts_e, top_k, histogram_eb=histogram_eb, progress=progress)


def check_target(target: tuple[float, ...] | None, num_experts: int) -> None:
    """Raise ConfigError unless a target is None or one positive share per expert with sum 1."""
    if target is None:
        return
    if len(target) != num_experts:
        raise ConfigError(f"the target load has {len(target)} shares for {num_experts} experts")
    if min(target) <= 0.0 or abs(sum(target) - 1.0) > 1e-6:
        raise ConfigError(f"target shares must be positive with sum 1, found least {min(target)} and sum {sum(target)}")


def _shares(target: tuple[float, ...] | None, experts: int) -> Tensor:
    """Q on the CPU, where the step computes."""
    if target is None:
        return torch.full((experts,), 1.0 / experts, dtype=torch.float64, device="cpu")
    return torch.tensor(target, dtype=torch.float64, device="cpu")
