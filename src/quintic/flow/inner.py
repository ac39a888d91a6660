"""Numbers of a token in order: each is predicted from earlier tokens and from the numbers of its own token before it.

A block by itself moves all numbers of a token by what earlier tokens say, so that neighbouring pixels of a patch know
nothing of each other. Here a masked layer (Germain et al. 2015) between the transformer and the coefficients tells
number j of those before it:

    u = GELU(C h + M x),    (mu, alpha) = what the transformer says + R u

Row k of M is zero behind number g_k, row j of R where g_k >= j. The Jacobian stays triangular. Given x all is one pass;
given z the numbers come one after the other, with few operations each. A fresh one changes nothing.

Shapes: h the transformer's numbers (..., w), x a token (..., d), r hidden numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core.roles import Constant, Normal, Role, declare

if TYPE_CHECKING:
    from quintic.flow.block import Linear

__all__ = ["Combine", "Inner"]

Combine = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Inner(nn.Module):
    """What a number of a token learns from those before it.

    Args:
        context: C, a layer from w to r.
        hidden: r.
        numbers: d.
        outputs: d, or 2 d with alpha before mu.
    """

    def __init__(self, context: Linear, hidden: int, numbers: int, outputs: int) -> None:
        super().__init__()
        self.context = context
        self.hidden, self.numbers, self.outputs = hidden, numbers, outputs
        self.read = nn.Parameter(torch.empty(hidden, numbers))
        self.leave = nn.Parameter(torch.empty(outputs, hidden))
        self.counts = [sum(self._last_seen(k) == j for k in range(hidden)) for j in range(numbers)]
        declare(self, "read", Role.EMBEDDING, Normal(1.0 / math.sqrt(numbers)))
        declare(self, "leave", Role.HEAD, Constant(0.0))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.numbers} -> {self.hidden} -> {self.outputs}"

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """What is added to the coefficients of tokens x, (..., outputs)."""
        place = torch.arange(self.numbers, device=x.device)
        seen = self._last_seen(torch.arange(self.hidden, device=x.device))
        u = self.context(h) + F.linear(x, self.read * (place <= seen[:, None]))
        below = seen < place.repeat(self.outputs // self.numbers)[:, None]
        return F.linear(F.gelu(u), self.leave * below)

    def solve(
        self, z: Tensor, out: Tensor, hidden: Tensor, combine: Combine | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens whose coefficients turn them into z.

        Args:
            z: (b, ..., d).
            out: (b, ..., outputs) what the transformer says of them.
            hidden: (b, ..., r) C h.
            combine: Makes mu and alpha of one number from those of several passes, which then lie in ``out`` and
                ``hidden`` side by side along the first axis.

        Returns:
            x and alpha, (b, ..., d); alpha is None if always 0.
        """
        d, copies = self.numbers, len(out) // max(1, len(z))
        reads, leaves = self.read.unbind(1), self.leave.T.split(self.counts)
        numbers, alphas = [], []
        for j in range(d):
            alpha = None if self.outputs == d else out[..., j : j + 1]
            mu = out[..., self.outputs - d + j : self.outputs - d + j + 1]
            if combine is not None:
                mu, alpha = combine(mu, alpha)
            number = z[..., j : j + 1]
            number = number + mu if alpha is None else torch.addcmul(mu, number, torch.exp(alpha))
            numbers.append(number)
            alphas.append(alpha)
            if j == d - 1:
                break
            # Units and outputs that are done with move as well: nobody reads them again.
            own = number if copies == 1 else torch.cat([number] * copies)
            hidden = torch.addcmul(hidden, own, reads[j])
            if self.counts[j]:
                units = hidden.narrow(-1, sum(self.counts[:j]), self.counts[j])
                out = out + F.gelu(units) @ leaves[j]
        return torch.cat(numbers, -1), None if alphas[0] is None else torch.cat(alphas, -1)

    def _last_seen(self, unit: Any) -> Any:
        """The last number that a hidden unit reads, which ascends and is never the token's last."""
        return unit * (self.numbers - 1) // self.hidden
