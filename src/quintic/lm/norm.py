"""RMSNorm: y = x / RMS(x) * gain (Zhang and Sennrich, arXiv 1910.07467).

With n = x / RMS(x), r = 1 / RMS(x) and incoming gradient g over d components,

    d gain = sum of g n,   dx = r (g gain - n <g gain, n> / d)

which a function of its own computes in a third of the passes over memory that autograd would take, and the kernels of
``norm.c`` in two passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quintic.core.kernels import fits_kernels, found_kernels, load_kernels
from quintic.core.roles import Constant, Role, declare

__all__ = ["RMSNorm", "rms_norm"]


class RMSNorm(nn.Module):
    """RMSNorm over the last axis.

    Args:
        dim: Its width.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(dim))
        declare(self, "gain", Role.VECTOR, Constant(1.0))

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{len(self.gain)}, eps={self.eps:g}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim) in the dtype of x; computed in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        return rms_norm(wide, self.gain.to(wide.dtype), self.eps).to(x.dtype)

    def stream(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself and its norm, for a residual stream: the gradients that come to both are added in passing."""
        if torch.is_grad_enabled() and fits_kernels(x, self.gain) and load_kernels() is not None:
            both: tuple[Tensor, Tensor] = _CompiledStream.apply(x, self.gain, self.eps)  # type: ignore[assignment]
            return both
        return x, self(x)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis; once differentiable."""
    # The compiler fuses it and decides itself what to keep; without gradients there is nothing to keep.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, gain.shape, gain, eps)
    function = _CompiledRMSNorm if fits_kernels(x, gain) and load_kernels() is not None else _RMSNorm
    out: Tensor = function.apply(x, gain, eps)  # type: ignore[assignment]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, gain)
        return n * gain

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        n, r, gain = ctx.saved_tensors
        gn = g * n
        along = (gn @ gain).unsqueeze(-1).div_(n.shape[-1])
        dx = (g * gain).addcmul_(n, along, value=-1.0).mul_(r)
        return dx, gn.flatten(0, -2).sum(0), None


class _CompiledRMSNorm(torch.autograd.Function):
    """Keeps x and r instead of n and r: x is somebody's anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        return _compiled(ctx, x, gain, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return _compiled_backward(ctx, None, grad_outputs[0])


class _CompiledStream(torch.autograd.Function):
    """x and its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _compiled(ctx, x, gain, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return _compiled_backward(ctx, *grad_outputs)


def _compiled(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x, gain = x.contiguous(), gain.contiguous()
    y, r = torch.empty_like(x), x.new_empty(x.shape[:-1])
    found_kernels().call("rms_norm", r.numel(), len(gain), float(eps), x, gain, r, y)
    ctx.save_for_backward(x, r, gain)
    return y


def _compiled_backward(ctx: Any, plus: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor, None]:
    x, r, gain = ctx.saved_tensors
    dx, dgain = torch.empty_like(x), torch.empty_like(gain)
    plus = None if plus is None else plus.contiguous()
    found_kernels().call("rms_norm_backward", r.numel(), len(gain), x, gain, r, g.contiguous(), plus, dx, dgain)
    return dx, dgain, None
