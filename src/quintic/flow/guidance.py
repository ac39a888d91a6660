"""Guidance: coefficients of a block from a pass with the class and one without.

Both passes give normals for the next token, N(mu_c, exp(2 alpha_c)) and N(mu_u, exp(2 alpha_u)). With weight w:

    linear   (TARFLOW, arXiv 2412.06329): alpha = alpha_c + w (alpha_c - alpha_u),  mu = mu_c + w (mu_c - mu_u)
    density  (STARFlow, arXiv 2506.06276): the normal proportional to p_c^(1+w) / p_u^w, which with
             s = min(1, sigma_c / sigma_u)^2 exists: sigma = sigma_c / sqrt(1 + w - w s),
             mu = ((1 + w) mu_c - w s mu_u) / (1 + w - w s)

A model without classes is guided by itself with attention logits divided by a temperature. The schedule "growing" gives
token i of n, in the block's own order, the weight w i / (n - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest

__all__ = ["Guidance"]

RULES = ("linear", "density")
SCHEDULES = ("constant", "growing")


@dataclass(frozen=True)
class Guidance:
    """How samples are pushed towards their class.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> Guidance(2.0, schedule="growing").weights(1, 5, 5)
        tensor([0.5000, 1.0000, 1.5000, 2.0000], dtype=torch.float64)
    """

    weight: float
    """0 is no guidance."""
    rule: str = "linear"
    """linear or density."""
    schedule: str = "constant"
    """constant or growing."""
    temperature: float = 1.0
    """Of attention in the pass without class."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"the guidance weight must be 0 or more, found {self.weight}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"the guidance temperature must be positive, found {self.temperature}")
        for name, value, known in (("rule", self.rule, RULES), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise ConfigError(f"unknown guidance {name} {value!r}{suggest(value, known)}")

    def weights(self, start: int, end: int, tokens: int) -> Tensor:
        """Weights of tokens ``start`` to ``end - 1`` of a block, (end - start,) float64 on the CPU."""
        if self.schedule == "constant":
            return torch.full((end - start,), self.weight, dtype=torch.float64, device="cpu")
        return self.weight * torch.arange(start, end, dtype=torch.float64, device="cpu") / (tokens - 1)

    def combine(
        self, mu: tuple[Tensor, Tensor], alpha: tuple[Tensor, Tensor] | None, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Guided mu and alpha.

        Args:
            mu: (b, k, d) with and without class.
            alpha: Likewise, or None if always 0.
            weights: (k, 1), from :meth:`weights`.
        """
        mu_c, mu_u = mu
        if self.rule == "linear":
            guided = None if alpha is None else torch.lerp(alpha[1], alpha[0], 1.0 + weights)
            return torch.lerp(mu_u, mu_c, 1.0 + weights), guided
        s = torch.ones_like(mu_c) if alpha is None else torch.exp(2.0 * (alpha[0] - alpha[1]).clamp(max=0.0))
        total = 1.0 + weights - weights * s
        guided = None if alpha is None else alpha[0] - 0.5 * torch.log(total)
        return ((1.0 + weights) * mu_c - weights * s * mu_u) / total, guided
