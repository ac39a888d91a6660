"""Activations of a feed-forward network, with and without a gate, written into given memory.

    plain:  a = act(h)                     gated:  a = act(g) * u,  h = [g u]      (Shazeer, arXiv 2002.05202)

Fused forward and backward kernels of torch, called with ``out``: experts run them on one scratch after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quintic.core import ConfigError, suggest

__all__ = ["ACTIVATIONS", "activate_", "activate_for_backward_", "activation_backward_", "check_activation"]

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


def activate_(name: str, h: Tensor, out: Tensor) -> None:
    """out = a, from h (..., f) or, when twice as wide as ``out``, [g u]."""
    if h.shape[-1] == out.shape[-1]:
        ACTIVATIONS[name].forward_(h, out)
        return
    z, up = h.chunk(2, dim=-1)
    ACTIVATIONS[name].forward_(z, out)
    out.mul_(up)


def activate_for_backward_(name: str, h: Tensor, out: Tensor, dh: Tensor) -> None:
    """As :func:`activate_`, leaving act(g) in the second half of ``dh`` for :func:`activation_backward_`."""
    if h.shape[-1] == out.shape[-1]:
        ACTIVATIONS[name].forward_(h, out)
        return
    (z, up), act = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)[1]
    ACTIVATIONS[name].forward_(z, act)
    torch.mul(act, up, out=out)


def activation_backward_(name: str, da: Tensor, h: Tensor, dh: Tensor) -> None:
    """Dh from da, after :func:`activate_for_backward_` on the same ``dh``; overwrites ``da``."""
    if h.shape[-1] == da.shape[-1]:
        ACTIVATIONS[name].backward_(da, h, dh)
        return
    (z, up), (dz, dup) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
    dup.mul_(da)
    ACTIVATIONS[name].backward_(da.mul_(up), z, dz)
