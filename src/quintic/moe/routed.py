"""The routed sum: every token through its k experts, dropless, forward and backward as one piece.

    y_n = sum over k of gate_nk expert_{id_nk}(x_n),     expert(x) = W_out act(W_in x)

Slots are sorted by expert, so each expert multiplies its own contiguous rows: O(tokens * k) work, no
(tokens, k, experts) array, every slot kept. On a CPU the experts are taken in runs that share one small scratch,
since most of the time beyond the matrix products is memory that the system has to hand out. One autograd function
holds the whole sum, because its backward pass can do with less than autograd would keep: with g = dL/dy at a slot's
token and a the activation,

    da' = W_out' g,   d gate = <da', a>,   da = gate da'

so that only x and h = W_in x are kept: neither the gathered tokens nor the experts' outputs. The routing is kept too
and not computed again. With ``normalize`` an expert is e = v / RMS(v) (post https://kexue.fm/archives/10699,
RMSNorm with unit gain) and

    d gate = <g, e>,   dv = gate / RMS(v) (g - e <g, e> / d)

where v is computed again from a. The arithmetic is an operator of its own: ``torch.compile`` calls it without a graph
break, and a change of load never recompiles.

Legend: n tokens, k choices, m = n k slots, r rows of a block, d width, f expert width, h = 2 f (gated) or f, e experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from quintic.moe.activation import activate_, activate_for_backward_, activation_backward_
from quintic.moe.dispatch import Layout, choose_kernel, grouped_is_legal, lay_out
from quintic.moe.products import outer_by_expert_, rows_by_expert_

__all__ = ["routed_experts", "unit_rms"]

_FEW = 32  # slots; measured on two cores
_EPS = 1e-8  # added to the mean square of an expert's output: an expert that is dead at a token stays finite


def routed_experts(
    x_nd: Tensor,
    ids_nk: Tensor,
    gates_nk: Tensor,
    w_in_ehd: Tensor,
    w_out_edf: Tensor,
    *,
    activation: str = "silu",
    normalize: bool = False,
) -> Tensor:
    """y_n = sum_k gates_nk * expert_{ids_nk}(x_n), dropless.

    Args:
        x_nd: (tokens, width).
        ids_nk: (tokens, k) int64 expert of each choice.
        gates_nk: (tokens, k) weight of each choice.
        w_in_ehd: (experts, 2 * hidden, width), gate rows first; or (experts, hidden, width) without gate.
        w_out_edf: (experts, width, hidden).
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
        normalize: Whether each expert's output is divided by its RMS.

    Returns:
        (tokens, width), in the dtype of ``x_nd`` or of the active autocast. Double backward is not supported.
    """
    if torch.is_autocast_enabled(x_nd.device.type):
        dtype = torch.get_autocast_dtype(x_nd.device.type)
        x_nd, w_in_ehd, w_out_edf = x_nd.to(dtype), w_in_ehd.to(dtype), w_out_edf.to(dtype)
    few = 0 < ids_nk.numel() <= _FEW and x_nd.device.type == "cpu"
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _few(x_nd, ids_nk, gates_nk, w_in_ehd, w_out_edf, activation, normalize)
    out: Tensor = _RoutedExperts.apply(x_nd, ids_nk, gates_nk, w_in_ehd, w_out_edf, activation, normalize)  # type: ignore[assignment]
    return out


def _few(
    x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor, w_in: Tensor, w_out: Tensor, activation: str, normalize: bool
) -> Tensor:
    """Slot by slot, as when a text is made token by token: sorting by expert would take longer than the products."""
    n, k = ids_nk.shape
    experts: list[int] = ids_nk.flatten().tolist()
    h_mh = x_nd.new_empty(n * k, w_in.shape[1])
    for slot, expert in enumerate(experts):
        torch.mv(w_in[expert], x_nd[slot // k], out=h_mh[slot])
    a_mf = h_mh.new_empty(n * k, w_out.shape[2])
    activate_(activation, h_mh, a_mf)
    v_md = x_nd.new_empty(n * k, w_out.shape[1])
    for slot, expert in enumerate(experts):
        torch.mv(w_out[expert], a_mf[slot], out=v_md[slot])
    wide_md = v_md.to(_accumulation(x_nd.dtype))
    if normalize:
        wide_md = wide_md * _inverse_rms(v_md)
    return torch.bmm(gates_nk.to(wide_md.dtype).unsqueeze(1), wide_md.view(n, k, -1)).squeeze(1).to(x_nd.dtype)


def unit_rms(v: Tensor) -> Tensor:
    """v / RMS(v) along the last axis: RMSNorm with unit gain, as ``normalize`` does it."""
    return (v * _inverse_rms(v)).to(v.dtype)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        ids_nk: Tensor,
        gates_nk: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        activation: str,
        normalize: bool,
    ) -> Tensor:
        y_nd, h_mh, slot_m, counts_e = torch.ops.quintic.routed_forward(
            x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize
        )
        ctx.save_for_backward(x_nd, gates_nk, w_in, w_out, h_mh, slot_m, counts_e)
        ctx.activation, ctx.normalize = activation, normalize
        return y_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx_nd, dgates_nk, dw_in, dw_out = torch.ops.quintic.routed_backward(
            grad_outputs[0], *ctx.saved_tensors, ctx.activation, ctx.normalize
        )
        return dx_nd, None, dgates_nk, dw_in, dw_out, None, None


def _forward(
    x_nd: Tensor, ids_nk: Tensor, gates_nk: Tensor, w_in: Tensor, w_out: Tensor, activation: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = ids_nk.shape
    flat_m = ids_nk.reshape(-1)
    slot_m = torch.argsort(flat_m, stable=True)
    counts_e = torch.bincount(flat_m, minlength=w_in.shape[0])
    h_mh = x_nd.new_empty(n * k, w_in.shape[1])
    if n == 0:
        return x_nd.new_zeros(x_nd.shape), h_mh, slot_m, counts_e
    layout = _layout(slot_m, counts_e, k, w_in, w_out)
    x_pd, gate_r1 = _with_padding(x_nd, layout), _gate_rows(gates_nk, layout, x_nd.dtype)
    y_pd = torch.zeros_like(x_pd, dtype=_accumulation(x_nd.dtype), memory_format=torch.contiguous_format)
    w_in_t, w_out_t = w_in.transpose(1, 2), w_out.transpose(1, 2)

    rows = max(block.stop - block.start for block in layout.blocks)
    wide_rd, a_rf = x_nd.new_empty(rows, x_nd.shape[1]), x_nd.new_empty(rows, w_out.shape[2])
    h_rh = h_mh if layout.real_m is None else x_nd.new_empty(rows, w_in.shape[1])
    for block in layout.blocks:
        here, r = slice(block.start, block.stop), block.stop - block.start
        token, wide, a, h = layout.token_r[here], wide_rd[:r], a_rf[:r], h_rh[here]
        torch.index_select(x_pd, 0, token, out=wide)
        h = rows_by_expert_(layout.kernel, block, wide, w_in_t, h)
        activate_(activation, h, a)
        if not normalize:
            a.mul_(gate_r1[here])
        wide = rows_by_expert_(layout.kernel, block, a, w_out_t, wide)
        if normalize:
            wide.mul_(_inverse_rms(wide) * gate_r1[here])
        y_pd.index_add_(0, token, wide.to(y_pd.dtype))
        if layout.kernel == "grouped":  # one block, and an array of its own
            h_mh = h
    if layout.real_m is not None:
        torch.index_select(h_rh, 0, layout.real_m, out=h_mh)
    return y_pd[:n].to(x_nd.dtype), h_mh, slot_m, counts_e


def _backward(
    dy_nd: Tensor,
    x_nd: Tensor,
    gates_nk: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    h_mh: Tensor,
    slot_m: Tensor,
    counts_e: Tensor,
    activation: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = gates_nk.shape
    dw_in = torch.empty_like(w_in, memory_format=torch.contiguous_format)
    dw_out = torch.empty_like(w_out, memory_format=torch.contiguous_format)
    if n == 0:
        return torch.zeros_like(x_nd), torch.zeros_like(gates_nk), dw_in.zero_(), dw_out.zero_()
    layout = _layout(slot_m, counts_e, k, w_in, w_out)
    x_pd, dy_pd, gate_r1 = (
        _with_padding(x_nd, layout),
        _with_padding(dy_nd.to(x_nd.dtype), layout),
        _gate_rows(gates_nk, layout, x_nd.dtype),
    )
    accumulation = _accumulation(x_nd.dtype)
    dx_pd = torch.zeros_like(x_pd, dtype=accumulation, memory_format=torch.contiguous_format)
    dgate_r = x_nd.new_empty(layout.slot_r.shape, dtype=accumulation)
    if layout.real_m is None:
        h_rh = h_mh
    else:
        h_rh = h_mh.new_zeros(layout.slot_r.numel(), h_mh.shape[1]).index_copy_(0, layout.real_m, h_mh)

    rows = max(block.stop - block.start for block in layout.blocks)
    (d, f), w_out_t = w_out.shape[1:], w_out.transpose(1, 2)
    dy_rd, wide_rd = x_nd.new_empty(2, rows, d)
    a_rf, da_rf = x_nd.new_empty(2, rows, f)
    dh_rh = x_nd.new_empty(rows, w_in.shape[1])
    for block in layout.blocks:
        here, r = slice(block.start, block.stop), block.stop - block.start
        token, gate, h = layout.token_r[here], gate_r1[here], h_rh[here]
        dy, wide, a, da, dh = dy_rd[:r], wide_rd[:r], a_rf[:r], da_rf[:r], dh_rh[:r]
        torch.index_select(dy_pd, 0, token, out=dy)
        activate_for_backward_(activation, h, a, dh)
        if normalize:
            wide = rows_by_expert_(layout.kernel, block, a, w_out_t, wide)
            inverse = _inverse_rms(wide)
            wide.mul_(inverse)
            slope = (dy * wide).sum(-1, keepdim=True)
            dgate_r[here] = slope.squeeze(-1)
            dy.sub_(wide.mul_(slope / d)).mul_(inverse * gate)
            da = rows_by_expert_(layout.kernel, block, dy, w_out, da)
        else:
            da = rows_by_expert_(layout.kernel, block, dy, w_out, da)
            torch.sum(torch.mul(da, a, out=dh[:, :f]), -1, dtype=accumulation, out=dgate_r[here])
            da.mul_(gate)
            a.mul_(gate)
        dw_out = outer_by_expert_(layout.kernel, block, dy, a, dw_out)
        activation_backward_(activation, da, h, dh)
        torch.index_select(x_pd, 0, token, out=wide)
        dw_in = outer_by_expert_(layout.kernel, block, dh, wide, dw_in)
        wide = rows_by_expert_(layout.kernel, block, dh, w_in, wide)
        dx_pd.index_add_(0, token, wide.to(accumulation))

    dgates_p = dgate_r.new_empty(n * k + 1).index_copy_(0, layout.slot_r, dgate_r)
    return dx_pd[:n].to(x_nd.dtype), dgates_p[: n * k].view(n, k).to(gates_nk.dtype), dw_in, dw_out


def _layout(slot_m: Tensor, counts_e: Tensor, top_k: int, w_in: Tensor, w_out: Tensor) -> Layout:
    counts: list[int] = counts_e.tolist()
    _, height, width = w_in.shape
    legal = grouped_is_legal(w_in.dtype, (width, height, w_out.shape[2]), w_in.device)
    kernel = choose_kernel(counts, width, height, cpu=w_in.device.type == "cpu", legal=legal)
    return lay_out(slot_m, counts, top_k, kernel)


def _with_padding(x_nd: Tensor, layout: Layout) -> Tensor:
    """A row of zeros at the end, which padding reads: its products and gradients are exact zeros."""
    return x_nd if layout.real_m is None else torch.cat([x_nd, x_nd.new_zeros(1, x_nd.shape[1])])


def _gate_rows(gates_nk: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    gates_m = gates_nk.reshape(-1)
    if layout.real_m is not None:
        gates_m = torch.cat([gates_m, gates_m.new_zeros(1)])
    return gates_m.index_select(0, layout.slot_r).unsqueeze(1).to(dtype)


def _inverse_rms(v: Tensor) -> Tensor:
    return v.to(_accumulation(v.dtype)).square().mean(-1, keepdim=True).add_(_EPS).rsqrt_()


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    """Sums over choices are rounded once: half precision adds up in float32."""
    return torch.promote_types(dtype, torch.float32)


def _fake_forward(x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize):
    slots = ids_nk.numel()
    return (
        x_nd.new_empty(x_nd.shape),
        x_nd.new_empty(slots, w_in.shape[1]),
        ids_nk.new_empty(slots),
        ids_nk.new_empty(w_in.shape[0]),
    )


def _fake_backward(dy_nd, x_nd, gates_nk, w_in, w_out, h_mh, slot_m, counts_e, activation, normalize):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x_nd, gates_nk, w_in, w_out))


torch.library.define(
    "quintic::routed_forward",
    "(Tensor x, Tensor ids, Tensor gates, Tensor w_in, Tensor w_out, str activation, bool normalize)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "quintic::routed_backward",
    "(Tensor dy, Tensor x, Tensor gates, Tensor w_in, Tensor w_out, Tensor h, Tensor slot, Tensor counts,"
    " str activation, bool normalize) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("quintic::routed_forward", "default", _forward)
torch.library.impl("quintic::routed_backward", "default", _backward)
torch.library.register_fake("quintic::routed_forward", _fake_forward)
torch.library.register_fake("quintic::routed_backward", _fake_backward)


@register_flop_formula(torch.ops.quintic.routed_forward)
def _forward_flops(x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize, *, out_shape=None, **_) -> int:
    """Without padding, which a smaller number of calls pays for."""
    slots = ids_nk[0] * ids_nk[1]
    return 2 * slots * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


@register_flop_formula(torch.ops.quintic.routed_backward)
def _backward_flops(
    dy_nd, x_nd, gates_nk, w_in, w_out, h_mh, slot_m, counts_e, activation, normalize, *, out_shape=None, **_
) -> int:
    again = 2 * slot_m[0] * w_out[1] * w_out[2] if normalize else 0
    return 2 * _forward_flops(x_nd, gates_nk, gates_nk, w_in, w_out, activation, normalize) + again
