"""The routed sum: every token through its k experts, dropless, forward and backward as one piece.

    y_n = sum over k of gate_nk expert_{id_nk}(x_n),     expert(x) = W_out act(W_in x)

Slots are sorted by expert, so each expert multiplies its own contiguous rows: O(tokens * k) work, no
(tokens, k, experts) array, every slot kept. On a CPU the experts are taken in runs that share one small scratch,
since most of the time beyond the matrix products is memory that the system has to hand out. One autograd function
holds the whole sum, because its backward pass can do with less than autograd would keep: with g = dL/dy at a slot's
token and a the activation,

    da' = W_out' g,   d gate = <da', a>,   da = gate da'

so that only x and h = W_in x are kept: neither the gathered tokens nor the experts' outputs. The routing is kept too
and not computed again. Gradients of frozen experts, or of an x that needs none, are left out. With ``normalize`` an
expert is e = v / RMS(v) (post https://kexue.fm/archives/10699, RMSNorm with unit gain) and

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
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.core.operators import operator
from quintic.moe import expert_kernels
from quintic.moe.activation import activate_, activate_for_backward_, activation_backward_, halves
from quintic.moe.dispatch import Block, Run, blocks_of, grouped_is_legal, kept_rows, lay_out, plan_runs
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
    plus_nd: Tensor | None = None,
) -> Tensor:
    """y_n = plus_n + sum_k gates_nk * expert_{ids_nk}(x_n), dropless.

    Args:
        x_nd: (tokens, width).
        ids_nk: (tokens, k) int64 expert of each choice.
        gates_nk: (tokens, k) weight of each choice.
        w_in_ehd: (experts, 2 * hidden, width), gate rows first; or (experts, hidden, width) without gate.
        w_out_edf: (experts, width, hidden).
        activation: A name of :data:`quintic.moe.activation.ACTIVATIONS`.
        normalize: Whether each expert's output is divided by its RMS.
        plus_nd: (tokens, width) or None for 0.

    Returns:
        (tokens, width), in the dtype of ``x_nd`` or of the active autocast, or of ``plus_nd`` if wider.
        Double backward is not supported.

    Raises:
        ConfigError: Tokens and experts differ in dtype.
    """
    if torch.is_autocast_enabled(x_nd.device.type) and x_nd.dtype != torch.float64:  # as autocast's own rule
        dtype = torch.get_autocast_dtype(x_nd.device.type)
        x_nd, w_in_ehd, w_out_edf = x_nd.to(dtype), w_in_ehd.to(dtype), w_out_edf.to(dtype)
    if not x_nd.dtype == w_in_ehd.dtype == w_out_edf.dtype:
        raise ConfigError(
            f"x is {x_nd.dtype}, the experts are {w_in_ehd.dtype}; convert one of them by .to(dtype), "
            "or use torch.autocast"
        )
    if plus_nd is not None and (plus_nd.dtype != x_nd.dtype or torch.compiler.is_compiling()):
        return plus_nd + routed_experts(
            x_nd, ids_nk, gates_nk, w_in_ehd, w_out_edf, activation=activation, normalize=normalize
        )
    few = 0 < ids_nk.numel() <= _FEW and x_nd.device.type == "cpu"
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y_nd = _few(x_nd, ids_nk, gates_nk, w_in_ehd, w_out_edf, activation, normalize)
        return y_nd if plus_nd is None else plus_nd + y_nd
    out: Tensor = _RoutedExperts.apply(  # type: ignore[assignment]
        x_nd, ids_nk, gates_nk, w_in_ehd, w_out_edf, activation, normalize, plus_nd
    )
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
    activate_(activation, halves(h_mh, a_mf.shape[1]), a_mf)
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
        plus_nd: Tensor | None,
    ) -> Tensor:
        y_nd, *kept = _routed(x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize, plus_nd)
        ctx.save_for_backward(x_nd, gates_nk, w_in, w_out, *kept)
        ctx.activation, ctx.normalize = activation, normalize
        return y_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs_x, _, _, *needs_w = ctx.needs_input_grad[:5]
        dx_nd, dgates_nk, dw_in, dw_out = _routed_backward(
            grad_outputs[0], *ctx.saved_tensors, ctx.activation, ctx.normalize, [needs_x, *needs_w]
        )
        dplus_nd = grad_outputs[0] if ctx.needs_input_grad[7] else None
        return dx_nd, None, dgates_nk, dw_in, dw_out, None, None, dplus_nd


def _forward(
    x_nd: Tensor,
    ids_nk: Tensor,
    gates_nk: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    normalize: bool,
    plus_nd: Tensor | None = None,
) -> tuple[Tensor, ...]:
    h_rh, row_nk, kept_r, counts_e = _kept(x_nd, ids_nk, w_in)
    if not ids_nk.numel():
        y_nd = x_nd.new_zeros(x_nd.shape) if plus_nd is None else plus_nd.clone()
        return y_nd, h_rh, row_nk, kept_r, counts_e.zero_()
    if (kernels := expert_kernels.kernels_for(activation, x_nd, normalize=normalize)) is not None:
        kept = (h_rh, row_nk, kept_r, counts_e)
        return expert_kernels.forward(kernels, x_nd, ids_nk, gates_nk, w_in, w_out, activation, plus_nd, kept), *kept
    # Not bincount, for which the host would wait: it asks for the largest expert.
    counts_e = counts_e.zero_().index_add_(0, ids_nk.reshape(-1), counts_e.new_ones(1).expand(ids_nk.numel()))
    runs, blocks, ends = _plan(counts_e, ids_nk.numel(), w_in, w_out)
    token_r, row_nk = lay_out(ids_nk, counts_e, runs)
    kept_r[: token_r.numel()] = token_r
    (d, f), w_in_t, w_out_t = w_out.shape[1:], w_in.transpose(1, 2), w_out.transpose(1, 2)
    v_rd = x_nd.new_empty(token_r.numel(), d)
    rows = max(block.stop - block.start for block in blocks)
    x_bd, a_bf = x_nd.new_empty(rows, d), x_nd.new_empty(rows, f)
    for block in blocks:
        here, b = slice(block.start, block.stop), block.stop - block.start
        x, a, h, v = x_bd[:b], a_bf[:b], h_rh[here], v_rd[here]
        torch.index_select(x_nd, 0, token_r[here], out=x)
        _into(h, rows_by_expert_(block, ends, x, w_in_t, h))
        activate_(activation, halves(h, f), a)
        _into(v, rows_by_expert_(block, ends, a, w_out_t, v))
        if normalize:
            v.mul_(_inverse_rms(v))
    y_nd = _combine(v_rd, row_nk, gates_nk)
    return y_nd if plus_nd is None else y_nd.add_(plus_nd), h_rh, row_nk, kept_r, counts_e


def _backward(
    dy_nd: Tensor,
    x_nd: Tensor,
    gates_nk: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    h_rh: Tensor,
    row_nk: Tensor,
    token_r: Tensor,
    counts_e: Tensor,
    activation: str,
    normalize: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gates, w_in and w_out; of x, w_in and w_out only those that ``output_mask`` asks for."""
    needs_x, needs_in, needs_out = output_mask
    if not gates_nk.numel():
        zeros = [t.new_zeros(t.shape) if on else None for t, on in zip((x_nd, w_in, w_out), output_mask, strict=True)]
        return zeros[0], torch.zeros_like(gates_nk), zeros[1], zeros[2]
    if (kernels := expert_kernels.kernels_for(activation, x_nd, normalize=normalize)) is not None:
        kept = (h_rh, row_nk, token_r, counts_e)
        return expert_kernels.backward(kernels, dy_nd, x_nd, gates_nk, w_in, w_out, kept, activation, output_mask)
    _, blocks, ends = _plan(counts_e, gates_nk.numel(), w_in, w_out)
    dw_in = w_in.new_empty(w_in.shape if ends is None else 0) if needs_in else None  # a grouped product makes its own
    dw_out = w_out.new_empty(w_out.shape if ends is None else 0) if needs_out else None
    dy_nd = dy_nd.to(x_nd.dtype)
    token_r = token_r[: blocks[-1].stop]
    # Padding has gate 0, and so a gradient of 0.
    gate_r1 = x_nd.new_zeros(token_r.numel(), 1)
    gate_r1.view(-1).index_copy_(0, row_nk.view(-1), gates_nk.reshape(-1).to(x_nd.dtype))
    (d, f), w_out_t = w_out.shape[1:], w_out.transpose(1, 2)
    dgate_r = x_nd.new_empty(token_r.numel(), dtype=_accumulation(x_nd.dtype))
    rows = max(block.stop - block.start for block in blocks)
    dx_rd = x_nd.new_empty(token_r.numel() if needs_x else rows, d)
    dy_bd, dh_bh = x_nd.new_empty(rows, d), x_nd.new_empty(rows, w_in.shape[1])
    a_bf, da_bf, act_bf = x_nd.new_empty(3, rows, f)
    for block in blocks:
        here, b = slice(block.start, block.stop), block.stop - block.start
        token, gate, h = token_r[here], gate_r1[here], halves(h_rh[here], f)
        dy, a, da, act, dh = dy_bd[:b], a_bf[:b], da_bf[:b], act_bf[:b], dh_bh[:b]
        dx = dx_rd[here] if needs_x else dx_rd[:b]
        torch.index_select(dy_nd, 0, token, out=dy)
        activate_for_backward_(activation, h, a, act)
        if normalize:
            v = rows_by_expert_(block, ends, a, w_out_t, dx)
            inverse = _inverse_rms(v)
            v.mul_(inverse)
            slope = (dy * v).sum(-1, keepdim=True)
            dgate_r[here] = slope.squeeze(-1)
            dy.sub_(v.mul_(slope / d)).mul_(inverse * gate)
            da = rows_by_expert_(block, ends, dy, w_out, da)
        else:
            da = rows_by_expert_(block, ends, dy, w_out, da)
            product = dh.view(-1, b, f)[0]  # not yet in use
            torch.sum(torch.mul(da, a, out=product), -1, dtype=dgate_r.dtype, out=dgate_r[here])
            da.mul_(gate)
            a.mul_(gate)
        if dw_out is not None:
            dw_out = outer_by_expert_(block, ends, dy, a, dw_out)
        activation_backward_(activation, da, h, act, halves(dh, f))
        if dw_in is not None:
            x = torch.index_select(x_nd, 0, token, out=dy)  # a small scratch stays in the cache
            dw_in = outer_by_expert_(block, ends, dh, x, dw_in)
        if needs_x:
            _into(dx, rows_by_expert_(block, ends, dh, w_in, dx))
    dgates_nk = dgate_r.index_select(0, row_nk.view(-1)).view_as(gates_nk).to(gates_nk.dtype)
    return _combine(dx_rd, row_nk) if needs_x else None, dgates_nk, dw_in, dw_out


def _kept(x_nd: Tensor, ids_nk: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what the backward pass needs, of the same size whatever the load: h, rows, tokens, counts."""
    rows = kept_rows(ids_nk.numel(), w_in.shape[0])
    where = ids_nk.new_empty(ids_nk.shape), ids_nk.new_empty(rows)
    return x_nd.new_empty(rows, w_in.shape[1]), *where, ids_nk.new_empty(w_in.shape[0])


def _plan(
    counts_e: Tensor, slots: int, w_in: Tensor, w_out: Tensor
) -> tuple[list[Run] | None, list[Block], Tensor | None]:
    """Runs, blocks and nothing else; or, for the grouped product, one block and the ends of its groups."""
    if _grouped(w_in, w_out):
        return None, [Block(0, slots, [])], counts_e.cumsum(0).to(torch.int32)
    _, height, width = w_in.shape
    cpu = w_in.device.type == "cpu"
    runs = plan_runs(counts_e.tolist(), width, height, cpu=cpu)  # here the host waits for another device
    return runs, blocks_of(runs, cpu=cpu), None


def _grouped(w_in: Tensor, w_out: Tensor) -> bool:
    widths = (w_in.shape[2], w_in.shape[1], w_out.shape[2])
    return w_in.device.type != "cpu" and grouped_is_legal(w_in.dtype, widths, w_in.device)


def _into(out: Tensor, found: Tensor) -> None:
    """A product is where it belongs, unless its kernel made a new array."""
    if found is not out:
        out.copy_(found)


def _combine(v_rd: Tensor, row_nk: Tensor, weight_nk: Tensor | None = None) -> Tensor:
    """Sum of each token's rows, in the order of its choices: without atomic additions, the same at every run."""
    if weight_nk is not None:
        weight_nk = weight_nk.to(v_rd.dtype)
    return F.embedding_bag(row_nk, v_rd, mode="sum", per_sample_weights=weight_nk)


def _inverse_rms(v: Tensor) -> Tensor:
    return v.to(_accumulation(v.dtype)).square().mean(-1, keepdim=True).add_(_EPS).rsqrt_()


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    """Sums over choices are rounded once: half precision adds up in float32."""
    return torch.promote_types(dtype, torch.float32)


def _fake_forward(x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize, plus_nd=None):
    return x_nd.new_empty(x_nd.shape), *_kept(x_nd, ids_nk, w_in)


def _fake_backward(
    dy_nd, x_nd, gates_nk, w_in, w_out, h_rh, row_nk, token_r, counts_e, activation, normalize, output_mask
):
    needed = ((x_nd, output_mask[0]), (gates_nk, True), (w_in, output_mask[1]), (w_out, output_mask[2]))
    return tuple(tensor.new_empty(tensor.shape) if on else None for tensor, on in needed)


def _forward_flops(x_nd, ids_nk, gates_nk, w_in, w_out, activation, normalize, plus_nd=None) -> int:
    """Without padding, which a smaller number of calls pays for."""
    slots = ids_nk[0] * ids_nk[1]
    return 2 * slots * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


def _backward_flops(
    dy_nd, x_nd, gates_nk, w_in, w_out, h_rh, row_nk, token_r, counts_e, activation, normalize, output_mask
) -> int:
    needs_x, needs_in, needs_out = output_mask
    per_slot = (needs_x + needs_in) * w_in[1] * w_in[2] + (1 + normalize + needs_out) * w_out[1] * w_out[2]
    return 2 * row_nk[0] * row_nk[1] * per_slot


_routed = operator(
    "routed_forward(Tensor x, Tensor ids, Tensor gates, Tensor w_in, Tensor w_out, str activation, bool normalize,"
    " Tensor? plus=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake_forward, _forward_flops,
)  # fmt: skip
_routed_backward = operator(
    "routed_backward(Tensor dy, Tensor x, Tensor gates, Tensor w_in, Tensor w_out, Tensor h, Tensor row, Tensor token,"
    " Tensor counts, str activation, bool normalize, bool[3] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward, _backward_flops,
)  # fmt: skip
