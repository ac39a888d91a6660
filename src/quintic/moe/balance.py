"""Load balance without an auxiliary loss: a bias that only selects.

Post: https://kexue.fm/archives/10757, after DeepSeek's arXiv 2408.15664. The layer is

    y = sum over i in argtop_k(rho + b) of rho_i e_i

so b decides who is chosen and never how much the choice weighs. With F the realised share of each expert
and Q the target (uniform), the straight-through loss 1/2 ||b + sg[F - b] - Q||^2 has the gradient F - Q,
and b takes a step against it after the batch that used it:

=============  =====================================================  ==========================================
rule           step                                                   source
=============  =====================================================  ==========================================
sign           b -= u sign(F - Q)                                     arXiv 2408.15664
sgd            b -= u (F - Q)                                         the post
relative       b -= u (F / Q - 1)                                     n times sgd for a uniform target
rms            b -= u (F - Q) / RMS(F - Q)                            the post; no step at F = Q
floored-rms    b -= u (F - Q) / max(RMS(F - Q), c sigma)              here: sigma is the sampling noise of F
=============  =====================================================  ==========================================

sign and rms keep a constant step size near balance and oscillate when u is large; the noise floor (c = 8)
makes the step vanish where F - Q is only sampling noise. The mean of the step is removed, since a common
shift of b selects nothing and would let b drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from quintic.core import ConfigError, suggest

__all__ = ["RULES", "Balance", "LossFree", "NoBalance"]

RULES = ("sign", "sgd", "relative", "rms", "floored-rms")

_NOISE_FLOOR = 8.0


@dataclass(frozen=True)
class NoBalance:
    """Leave the router alone: the bias stays zero."""

    def step(self, bias_e: Tensor, counts_e: Tensor, top_k: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class LossFree:
    """Balance by a selection bias.

    Args:
        rule: One of :data:`RULES`.
        rate: u, in units of the router's score. 0.01 suits sigmoid scores and ``floored-rms``; ``sign``
            wants about 0.001.

    Raises:
        ConfigError: Unknown rule or negative rate.
    """

    rule: str = "floored-rms"
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"unknown balancing rule {self.rule!r}{suggest(self.rule, RULES)}")
        if not (self.rate >= 0.0 and math.isfinite(self.rate)):
            raise ConfigError(f"balancing rate must be a finite number >= 0, found {self.rate}")

    def step(self, bias_e: Tensor, counts_e: Tensor, top_k: int) -> None:
        """Move the bias, in place, after the batch whose counts these are.

        Args:
            bias_e: (experts,) float32.
            counts_e: (experts,) integers, summed over micro-batches and ranks.
            top_k: Choices per token.
        """
        counts = counts_e.cpu().double()  # a handful of numbers, and not every device has float64
        total = counts.sum()
        if total == 0:
            return
        experts = counts.numel()
        excess = counts / total - 1.0 / experts
        rms = excess.square().mean().sqrt()
        if rms == 0:
            return
        if self.rule == "sign":
            direction = excess.sign()
        elif self.rule == "sgd":
            direction = excess
        elif self.rule == "relative":
            direction = excess * experts
        elif self.rule == "rms":
            direction = excess / rms
        else:
            # Standard deviation of a share when tokens choose independently and in balance.
            tokens, share = total / top_k, top_k / experts
            noise = (tokens * share * (1.0 - share)).sqrt() / total
            direction = excess / rms.clamp(min=_NOISE_FLOOR * noise)
        bias_e -= (self.rate * (direction - direction.mean())).to(bias_e.device, bias_e.dtype)


Balance = NoBalance | LossFree
