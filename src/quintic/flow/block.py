"""One block of a TARFLOW: an affine autoregression over patches whose coefficients a causal transformer computes.

    z_0 = x_0,    z_i = (x_i - mu_i) exp(-alpha_i),    (mu_i, alpha_i) = f(x_0 .. x_{i-1})

(post 10667, Zhai et al. 2024, arXiv 2412.06329.) The Jacobian is triangular, log |det| = -sum alpha. Given x, all z_i
come from one parallel pass; given z, the x_i come one after the other. In every second block the tokens are in reverse
order. Position i of the tables is the i-th token in the block's own order. Optionally f sees, for number j of a token,
the numbers of that token before j as well (:mod:`quintic.flow.inner`); then these are in reverse order there too.

Shapes: b batch, n tokens, d numbers of a token, w width, h heads. The output at place i is for token i + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core.roles import Constant, Normal, Role, declare
from quintic.flow.inner import Inner

__all__ = ["FlowBlock", "Layer", "Linear"]


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        n_in: Numbers in.
        n_out: Numbers out.
        role: What W is to the optimizer.
        std: Of the initial W, in units of 1 / sqrt(n_in).
        row_blocks: Matrices that W consists of, on top of each other.
    """

    def __init__(
        self, n_in: int, n_out: int, *, role: Role = Role.MATRIX, std: float = 0.5, row_blocks: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        init = Normal(std / math.sqrt(n_in)) if std else Constant(0.0)
        declare(self, "weight", role, init, row_blocks=row_blocks)
        declare(self, "bias", Role.VECTOR, Constant(0.0))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        return F.linear(x, self.weight, self.bias)

    def refined(self, x: Tensor) -> Tensor:
        """As :meth:`forward`, but under autocast neither y nor W is rounded, only x, though all products are fast.

        With W = H + L, both in bfloat16, and r the rounded H x, it is y = r + (H x - r + L x): a product that starts
        from -r adds in float32, and rounds only the small bracket. The gradient is that of H x.
        """
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self(x)
        rounded = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            flat, high = x.flatten(0, -2).to(rounded), self.weight.to(rounded)
            y = F.linear(flat, high)
            with torch.no_grad():
                low = (self.weight - high).to(rounded)
                rest = torch.addmm(torch.addmm(-y, flat, high.T), flat, low.T)
            return (y + rest.to(self.bias.dtype) + self.bias).unflatten(0, x.shape[:-1])


class _Norm(nn.LayerNorm):
    """Layer normalisation with declared roles."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        declare(self, "weight", Role.VECTOR, Constant(1.0))
        declare(self, "bias", Role.VECTOR, Constant(0.0))


class Layer(nn.Module):
    """Causal attention and a feed-forward with GELU, each behind a norm and added to its input."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.attention_norm = _Norm(width)
        self.qkv = Linear(width, 3 * width, row_blocks=3)
        self.mix = Linear(width, width)
        self.mlp_norm = _Norm(width)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x_bnw: Tensor, temperature: float = 1.0) -> Tensor:
        """(b, n, w) -> (b, n, w); attention logits are divided by ``temperature``."""
        b, n, w = x_bnw.shape
        q, k, v = self.qkv(self.attention_norm(x_bnw)).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        scale = 1.0 / (math.sqrt(w // self.heads) * temperature)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x_bnw = x_bnw + self.mix(mixed.transpose(1, 2).reshape(b, n, w))
        return x_bnw + self.down.refined(F.gelu(self.up(self.mlp_norm(x_bnw))))


class FlowBlock(nn.Module):
    """One block.

    Args:
        tokens: n.
        numbers: d.
        width: w.
        layers: Of the transformer.
        head_width: Channels of a head; divides ``width``.
        num_classes: Rows of the class table, beside the one for "no label"; 0 is without a table.
        flipped: Whether tokens are taken in reverse.
        volume_preserving: Whether alpha is 0.
        inner_width: Hidden numbers of the layer within tokens; 0 is without.
    """

    def __init__(
        self,
        tokens: int,
        numbers: int,
        width: int,
        layers: int,
        head_width: int,
        *,
        num_classes: int = 0,
        flipped: bool = False,
        volume_preserving: bool = False,
        inner_width: int = 0,
    ) -> None:
        super().__init__()
        self.flipped = flipped
        self.volume_preserving = volume_preserving
        self.num_classes = num_classes
        self.enter = Linear(numbers, width, role=Role.EMBEDDING, std=1.0)
        self.position = nn.Parameter(torch.empty(tokens, width))
        declare(self, "position", Role.EMBEDDING, Normal(0.02))
        if num_classes:
            self.classes = nn.Parameter(torch.empty(num_classes + 1, width))
            declare(self, "classes", Role.EMBEDDING, Normal(0.02))
        self.layers = nn.ModuleList(Layer(width, head_width) for _ in range(layers))
        # Zero: a fresh block is the identity.
        outputs = numbers if volume_preserving else 2 * numbers
        self.leave = Linear(width, outputs, role=Role.HEAD, std=0.0)
        self.inner = None
        if inner_width:
            self.inner = Inner(Linear(width, inner_width, std=1.0), inner_width, numbers, outputs)

    def extra_repr(self) -> str:
        """What no submodule shows."""
        tokens, classes = len(self.position), f", {self.num_classes} classes" if self.num_classes else ""
        return f"{tokens} tokens{' in reverse' if self.flipped else ''}{classes}"

    def coefficients(
        self, x_bnd: Tensor, labels: Tensor | None, temperature: float = 1.0, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """mu and alpha of the tokens after each given one.

        Args:
            x_bnd: The first tokens, at most n - 1 of them matter, in the block's order.
            labels: (b,) rows of the class table; None without one.
            temperature: Of attention.
            own: (b, n, d) those next tokens themselves; a block with a layer within tokens reads them too.

        Returns:
            (b, n, d) each, in the parameters' precision whatever autocast says; alpha is None if always 0.
        """
        h = self._hidden(x_bnd, labels, temperature)
        # A rounding of alpha is an error of the likelihood, so these products are never in bfloat16.
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.leave.weight.dtype)
            out = self.leave(h)
            if self.inner is not None:
                assert own is not None
                out = out + self.inner(h, own.to(h.dtype))
        if self.volume_preserving:
            return out, None
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha

    def _hidden(self, x_bnd: Tensor, labels: Tensor | None, temperature: float = 1.0) -> Tensor:
        """What the transformer says after each given token, (b, n, w)."""
        # bfloat16 would move a pixel by up to 1/512, a quarter of a level.
        with torch.autocast(x_bnd.device.type, enabled=False):
            h = self.enter(x_bnd.to(self.enter.weight.dtype)) + self.position[: x_bnd.shape[1]]
        if labels is not None:
            h = h + self.classes[labels][:, None]
        for layer in self.layers:
            h = layer(h, temperature)
        return h

    def ordered(self, x_bnd: Tensor) -> Tensor:
        """From the image's order of tokens to the block's, or back."""
        if not self.flipped:
            return x_bnd
        return x_bnd.flip(1) if self.inner is None else x_bnd.flip(1, 2)

    def forward(self, x_bnd: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The parallel way: tokens (b, n, d) in the image's order to z likewise, and log |det| (b,)."""
        x_bnd = self.ordered(x_bnd)
        mu, alpha = self.coefficients(x_bnd[:, :-1], labels, own=x_bnd[:, 1:])
        rest = x_bnd[:, 1:] - mu
        if alpha is None:
            logdet = rest.new_zeros(len(rest))
        else:
            rest = rest * torch.exp(-alpha)
            logdet = -alpha.sum((1, 2))
        return self.ordered(torch.cat([x_bnd[:, :1], rest], dim=1)), logdet

    def inverse(self, z_bnd: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sequential way, with gradients: z (b, n, d) to x, and log |det| (b,) of this map.

        One pass over all earlier tokens for every token; without gradients use :mod:`quintic.flow.invert`.
        """
        z_bnd = self.ordered(z_bnd)
        x_bnd = z_bnd[:, :1]
        logdet = z_bnd.new_zeros(len(z_bnd))
        for i in range(1, z_bnd.shape[1]):
            h = self._hidden(x_bnd, labels)[:, -1]
            with torch.autocast(h.device.type, enabled=False):
                h = h.to(self.leave.weight.dtype)
                x, alpha = self._solve(z_bnd[:, i], self.leave(h), h)
            if alpha is not None:
                logdet = logdet + alpha.sum(1)
            x_bnd = torch.cat([x_bnd, x[:, None]], dim=1)
        return self.ordered(x_bnd), logdet

    def _solve(self, z: Tensor, out: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (b, d) that become z, and their alpha."""
        if self.inner is not None:
            return self.inner.solve(z, out, self.inner.context(h))
        if self.volume_preserving:
            return z + out, None
        alpha, mu = out.chunk(2, dim=-1)
        return z * torch.exp(alpha) + mu, alpha
