"""One learned monotone map for every number of an image: a rational-quadratic spline (Durkan et al. 2019).

A block gives every pixel a normal density, but the noise within a level is uniform, or exponential in logits, and being
independent of all else it stays what it is through block after block. A spline before the blocks makes it about normal,
for a few dozen parameters; one behind them fits the tails of the latents. From knot (x0, y0) to the next, w further and
h higher, with slopes d0 and d1 at both and s = h / w,

    y = y0 + h (s t^2 + d0 t (1 - t)) / (s + (d0 + d1 - 2 s) t (1 - t)),    t = (x - x0) / w

with straight lines beyond the outermost knots. The inverse is the root of a quadratic. A fresh one is the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core.roles import Constant, Role, declare

__all__ = ["Spline"]

_LEAST = 0.01
"""Smallest bin, relative to the mean one, and smallest slope."""
_SLOPE_1 = math.log(math.e - 1.0)
"""Where softplus is 1."""


class Spline(nn.Module):
    """A monotone map of numbers, one for all.

    Args:
        bins: Between the outermost knots, at ``-bound`` and ``bound``.
        bound: Maps to itself, as does ``-bound``.
    """

    def __init__(self, bins: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.widths = nn.Parameter(torch.empty(bins))
        self.heights = nn.Parameter(torch.empty(bins))
        self.slopes = nn.Parameter(torch.empty(bins + 1))
        for name in ("widths", "heights", "slopes"):
            declare(self, name, Role.VECTOR, Constant(0.0))

    def extra_repr(self) -> str:
        """Knots."""
        return f"{len(self.widths)} bins, bound {self.bound:g}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, ...) to y of the same shape, and log |det dy/dx| (b,)."""
        places, slopes = self._knots()
        inside = x.clamp(-self.bound, self.bound)
        x0, y0, w, h, d0, d1 = self._bins(places, slopes, places[0], inside)
        t, s = (inside - x0) / w, h / w
        q = t * (1.0 - t)
        below = s + (d0 + d1 - 2.0 * s) * q
        y = y0 + h * (s * t * t + d0 * q) / below
        logdet = 2.0 * (s / below).log() + (d1 * t * t + 2.0 * s * q + d0 * (1.0 - t).square()).log()
        # Beyond the knots t is 0 or 1, where the slope is that of the line.
        return y + (x - inside) * torch.where(x > 0, slopes[-1], slopes[0]), logdet.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """y to x."""
        places, slopes = self._knots()
        inside = y.clamp(-self.bound, self.bound)
        x0, y0, w, h, d0, d1 = self._bins(places, slopes, places[1], inside)
        s, rise = h / w, inside - y0
        bend = (d0 + d1 - 2.0 * s) * rise
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * rise
        t = 2.0 * c / (-b - (b * b - 4.0 * a * c).clamp_min(0.0).sqrt())
        return x0 + t * w + (y - inside) / torch.where(y > 0, slopes[-1], slopes[0])

    def _knots(self) -> tuple[Tensor, Tensor]:
        """x and y of the knots (2, bins + 1), and slopes there (bins + 1,)."""
        shares = torch.stack([self.widths, self.heights]).softmax(-1)
        shares = _LEAST / shares.shape[1] + (1.0 - _LEAST) * shares
        sums = torch.cat([F.pad(shares.cumsum(-1)[:, :-1], (1, 0)), shares.new_ones(2, 1)], dim=1)
        slopes = _LEAST + (1.0 - _LEAST) * F.softplus(self.slopes + _SLOPE_1)
        return self.bound * (2.0 * sums - 1.0), slopes

    @staticmethod
    def _bins(places: Tensor, slopes: Tensor, by: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """x0, y0, w, h, d0 and d1 of the bin of every value; ``by`` is the row of ``places`` it is looked up in."""
        index = torch.searchsorted(by[1:-1].detach().contiguous(), values.detach().contiguous())
        table = torch.stack([*places[:, :-1], *places.diff(dim=1), slopes[:-1], slopes[1:]], dim=1)
        return F.embedding(index, table).unbind(-1)
