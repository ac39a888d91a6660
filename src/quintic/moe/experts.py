"""Feed-forward networks: one dense SwiGLU, and a stack of them of which each token visits k.

    SwiGLU(x) = W_down (silu(W_gate x) * W_up x)                       (Shazeer, arXiv 2002.05202)

Dropless: slots are sorted by expert, each expert multiplies its own contiguous rows, nothing is padded and no
(tokens, k, experts) array exists. One autograd function holds the whole routed sum, because its backward pass
can do with less than autograd would keep: with g = dL/dy at a slot's token and a the activation,

    da' = g W_down,   d gate = <da', a>,   da = gate da'

so the experts' outputs need not be saved, and gathers are undone by gathers (deterministic, no scatter-add).

Legend: n tokens, k choices, m = n k slots, d width, f expert width, e experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quintic.core.roles import Normal, Role, declare

__all__ = ["Experts", "SwiGLU", "routed_experts"]


class SwiGLU(nn.Module):
    """A dense gated feed-forward network.

    Args:
        d_model: Width in and out.
        d_hidden: Hidden width.
        out_scale: Factor of the initial standard deviation of the output projection.
    """

    def __init__(self, d_model: int, d_hidden: int, *, out_scale: float = 1.0) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_hidden))
        declare(self, "gate_up", Role.MATRIX, Normal(1.0 / math.sqrt(d_model)), row_blocks=2)
        declare(self, "down", Role.MATRIX, Normal(out_scale / math.sqrt(d_hidden)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        activation: Tensor = _GatedActivation.apply(F.linear(x, self.gate_up))  # type: ignore[assignment]
        return F.linear(activation, self.down)


class Experts(nn.Module):
    """A stack of SwiGLU networks.

    Args:
        d_model: Width in and out.
        d_expert: Hidden width of one expert.
        num_experts: E.
        out_scale: Factor of the initial standard deviation of the output projections.
    """

    def __init__(self, d_model: int, d_expert: int, num_experts: int, *, out_scale: float = 1.0) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        declare(self, "gate_up", Role.EXPERT_STACK, Normal(1.0 / math.sqrt(d_model)), row_blocks=2)
        declare(self, "down", Role.EXPERT_STACK, Normal(out_scale / math.sqrt(d_expert)))

    def forward(self, x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor) -> Tensor:
        """sum over the k choices of gate * expert(x): (tokens, width) -> (tokens, width)."""
        return routed_experts(x_nd, ids_nk, gates_nk, self.gate_up, self.down)


def routed_experts(x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor, gate_up_ehd: Tensor, down_edf: Tensor) -> Tensor:
    """y_n = sum_k gates_nk * SwiGLU_{ids_nk}(x_n), dropless.

    Args:
        x_nd: (tokens, width).
        ids_nk: (tokens, k) int64 expert of each choice.
        gates_nk: (tokens, k) weight of each choice.
        gate_up_ehd: (experts, 2 * hidden, width), gate rows first.
        down_edf: (experts, width, hidden).

    Returns:
        (tokens, width), in the dtype of ``x_nd`` or of the active autocast. Double backward is not supported.
    """
    if torch.is_autocast_enabled(x_nd.device.type):
        dtype = torch.get_autocast_dtype(x_nd.device.type)
        x_nd, gate_up_ehd, down_edf = x_nd.to(dtype), gate_up_ehd.to(dtype), down_edf.to(dtype)
    out: Tensor = _RoutedExperts.apply(x_nd, ids_nk, gates_nk, gate_up_ehd, down_edf)  # type: ignore[assignment]
    return out


class _GatedActivation(torch.autograd.Function):
    """silu(gate) * up of a fused (..., 2 f) projection, saving the projection only."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (h,) = ctx.saved_tensors
        return _gated_backward(grad_outputs[0], h, F.silu(h.chunk(2, dim=-1)[0]))


def _gated_backward(da: Tensor, h: Tensor, silu: Tensor) -> Tensor:
    """Gradient of the fused projection h, given that of silu(gate) * up and silu(gate)."""
    dh = torch.empty_like(h)
    gate, up = h.chunk(2, dim=-1)
    dgate, dup = dh.chunk(2, dim=-1)
    torch.mul(da, silu, out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(da * up, gate))
    return dh


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        n, k = ids_nk.shape
        flat_m = ids_nk.reshape(-1)
        slot_m = torch.argsort(flat_m, stable=True)
        inverse_m = torch.empty_like(slot_m)
        inverse_m[slot_m] = torch.arange(n * k, device=slot_m.device)
        ends = torch.bincount(flat_m, minlength=gate_up.shape[0]).cumsum(0).tolist()
        token_m = slot_m // k if k > 1 else slot_m

        x_md = x_nd.index_select(0, token_m)
        gate_m1 = gates_nk.reshape(-1).index_select(0, slot_m).unsqueeze(1).to(x_nd.dtype)
        h_mh = _rows_by_expert(x_md, gate_up.transpose(1, 2), ends)
        g_mf, u_mf = h_mh.chunk(2, dim=-1)
        a_mf = F.silu(g_mf).mul_(u_mf)
        y_md = _rows_by_expert(a_mf * gate_m1, down.transpose(1, 2), ends)
        y_nd = y_md.index_select(0, inverse_m).unflatten(0, (n, k)).sum(1)

        ctx.ends, ctx.k = ends, k
        ctx.save_for_backward(x_nd, gate_m1, gate_up, down, h_mh, token_m, inverse_m)
        ctx.gates_dtype = gates_nk.dtype
        return y_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy_nd,) = grad_outputs
        x_nd, gate_m1, gate_up, down, h_mh, token_m, inverse_m = ctx.saved_tensors
        ends, k = ctx.ends, ctx.k
        n = dy_nd.shape[0]
        g_mf, u_mf = h_mh.chunk(2, dim=-1)
        silu_mf = F.silu(g_mf)
        a_mf = silu_mf * u_mf

        dy_md = dy_nd.index_select(0, token_m)
        da_mf = _rows_by_expert(dy_md, down, ends)
        dgate_m = (da_mf * a_mf).sum(-1)
        ddown = _outer_by_expert(dy_md, a_mf.mul_(gate_m1), ends, down)
        da_mf.mul_(gate_m1)
        dh_mh = _gated_backward(da_mf, h_mh, silu_mf)
        dgate_up = _outer_by_expert(dh_mh, x_nd.index_select(0, token_m), ends, gate_up)
        dx_md = _rows_by_expert(dh_mh, gate_up, ends)
        dx_nd = dx_md.index_select(0, inverse_m).unflatten(0, (n, k)).sum(1)
        dgates_nk = dgate_m.index_select(0, inverse_m).view(n, k).to(ctx.gates_dtype)
        return dx_nd, None, dgates_nk, dgate_up, ddown


def _rows_by_expert(x_mi: Tensor, w_eio: Tensor, ends: list[int]) -> Tensor:
    """out[rows of e] = x[rows of e] @ w[e], rows sorted by expert."""
    out_mo = x_mi.new_empty(x_mi.shape[0], w_eio.shape[2])
    start = 0
    for e, end in enumerate(ends):
        if end > start:
            torch.mm(x_mi[start:end], w_eio[e], out=out_mo[start:end])
        start = end
    return out_mo


def _outer_by_expert(a_mo: Tensor, b_mi: Tensor, ends: list[int], like: Tensor) -> Tensor:
    """out[e] = a[rows of e]' @ b[rows of e]; exact zeros for an expert without rows."""
    out_eoi = torch.empty_like(like, memory_format=torch.contiguous_format)
    start = 0
    for e, end in enumerate(ends):
        if end > start:
            torch.mm(a_mo[start:end].t(), b_mi[start:end], out=out_eoi[e])
        else:
            out_eoi[e].zero_()
        start = end
    return out_eoi
