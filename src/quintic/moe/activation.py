"""Activations of a feed-forward network, with and without a gate, written into given memory.

    plain:  a = act(h)                     gated:  a = act(g) * u,  h = [g u]      (Shazeer, arXiv 2002.05202)

Fused forward and backward kernels of torch, called with ``out``: experts run them on one scratch after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quintic.core import ConfigError, suggest

__all__ = [
    "ACTIVATIONS", "activate_", "activate_for_backward_", "activation_backward_", "check_activation", "halves",
]  # fmt: skip

_aten = torch.ops.aten


class _Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    """z -> act(z), with autograd."""
    forward_: Callable[[Tensor, Tensor], object]
    """(z, out): out = act(z)."""
    backward_: Callable[[Tensor, Tensor, Tensor], object]
    """(da, z, out): out = da * act'(z)."""


ACTIVATIONS: dict[str, _Activation] = {
    "silu": _Activation(
        F.silu,
        lambda z, out: _aten.silu.out(z, out=out),
        lambda da, z, out: _aten.silu_backward.grad_input(da, z, grad_input=out),
    ),
    "gelu": _Activation(
        F.gelu,
        lambda z, out: _aten.gelu.out(z, out=out),
        lambda da, z, out: _aten.gelu_backward.grad_input(da, z, grad_input=out),
    ),
    "gelu_tanh": _Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z, out: _aten.gelu.out(z, approximate="tanh", out=out),
        lambda da, z, out: _aten.gelu_backward.grad_input(da, z, approximate="tanh", grad_input=out),
    ),
    "relu": _Activation(
        torch.relu,
        lambda z, out: torch.clamp_min(z, 0.0, out=out),
        lambda da, z, out: _aten.threshold_backward.grad_input(da, z, 0.0, grad_input=out),
    ),
}


def check_activation(name: str) -> None:
    """Refuse an unknown activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{suggest(name, ACTIVATIONS)}")


def halves(h: Tensor, width: int) -> tuple[Tensor, ...]:
    """(z, up) of a projection h = [z up] of a gated network of hidden width ``width``; (h,) of a plain one."""
    return (h,) if h.shape[-1] == width else h.chunk(2, dim=-1)


def activate_(name: str, h: Sequence[Tensor], out: Tensor) -> None:
    """out = a, from h = (z, up) or (z,)."""
    ACTIVATIONS[name].forward_(h[0], out)
    if len(h) > 1:
        out.mul_(h[1])


def activate_for_backward_(name: str, h: Sequence[Tensor], out: Tensor, act: Tensor) -> None:
    """As :func:`activate_`, leaving act(z) of a gated network in ``act`` for :func:`activation_backward_`."""
    if len(h) == 1:
        ACTIVATIONS[name].forward_(h[0], out)
        return
    ACTIVATIONS[name].forward_(h[0], act)
    torch.mul(act, h[1], out=out)


def activation_backward_(name: str, da: Tensor, h: Sequence[Tensor], act: Tensor, dh: Sequence[Tensor]) -> None:
    """Dh from da, with the ``act`` of :func:`activate_for_backward_`; overwrites ``da``."""
    if len(h) > 1:
        torch.mul(act, da, out=dh[1])
        da.mul_(h[1])
    ACTIVATIONS[name].backward_(da, h[0], dh[0])
