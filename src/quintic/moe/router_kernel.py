"""The usual router on a CPU, by the C kernels of ``routing.c``: normalised gates of sigmoid scores, the k best of all.

A block of tokens stays in the cache from its logits to its choices, and back from the gates' gradients to those of x.
Autograd sees one function, though a decision that is replaced in between (``keep``) gets its own gates.

Legend: n tokens, d width, e experts, k choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintic.core.kernels import fits_kernels, found_kernels, load_kernels
from quintic.core.operators import operator

__all__ = ["fits_fused_route", "fused_route"]

_FEW_ROWS = 16  # which torch's operators do as fast


def fits_fused_route(x_nd: Tensor, weight_ed: Tensor, bias_e: Tensor) -> bool:
    """Whether :func:`fused_route` is for this: float32 on a CPU with kernels, and more than a few tokens."""
    return len(x_nd) > _FEW_ROWS and fits_kernels(x_nd, weight_ed, bias_e) and load_kernels() is not None


def fused_route(
    x_nd: Tensor,
    weight_ed: Tensor,
    bias_e: Tensor,
    top_k: int,
    scale: float,
    mask_n: Tensor | None,
    keep: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, ...]:
    """Ids, gates, counts, logits, scores and biased scores, as the fields of :class:`quintic.moe.router.Routing`.

    Args:
        x_nd: (tokens, width) float32, as are the next two.
        weight_ed: (experts, width).
        bias_e: (experts,).
        top_k: Choices per token.
        scale: Of the gates.
        mask_n: (tokens,) bool; False is not counted.
        keep: From the chosen ids to the ids to use.
    """
    found: tuple[Tensor, ...] = _Route.apply(x_nd, weight_ed, bias_e, top_k, scale, mask_n, keep)  # type: ignore[assignment]
    return found


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight_ed: Tensor,
        bias_e: Tensor,
        top_k: int,
        scale: float,
        mask_n: Tensor | None,
        keep: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        logits_ne, scores_ne, biased_ne, ids_nk = _route(x_nd, weight_ed, bias_e, top_k)
        if keep is not None:
            ids_nk = keep(ids_nk)
        gates_nk, counts_e = scores_ne.new_empty(ids_nk.shape), ids_nk.new_empty(len(weight_ed))
        total_n, mask_n = scores_ne.new_empty(len(ids_nk)), None if mask_n is None else mask_n.contiguous()
        found_kernels().call(
            "normalised_gates", *scores_ne.shape, top_k, float(scale), scores_ne, ids_nk, mask_n,
            gates_nk, total_n, counts_e,
        )  # fmt: skip
        ctx.save_for_backward(x_nd, weight_ed, scores_ne, ids_nk, gates_nk, total_n)
        ctx.scale = scale
        ctx.mark_non_differentiable(ids_nk, counts_e, biased_ne)
        ctx.set_materialize_grads(False)
        return ids_nk, gates_nk, counts_e, logits_ne, scores_ne, biased_ne

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, dgates_nk, _, dlogits_ne, dscores_ne, _ = grad_outputs
        dx_nd, dweight_ed = _route_backward(
            dgates_nk, dlogits_ne, dscores_ne, *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[:2]
        )
        return dx_nd, dweight_ed, None, None, None, None, None


def _forward(x_nd: Tensor, weight_ed: Tensor, bias_e: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Logits, scores, biased scores and ids."""
    x_nd, weight_ed, bias_e = x_nd.contiguous(), weight_ed.contiguous(), bias_e.contiguous()
    made = _fake_forward(x_nd, weight_ed, bias_e, top_k)
    found_kernels().call("route", *x_nd.shape, len(weight_ed), top_k, x_nd, weight_ed, bias_e, *made)
    return made


def _backward(
    dgates_nk: Tensor | None,
    dlogits_ne: Tensor | None,
    dscores_ne: Tensor | None,
    x_nd: Tensor,
    weight_ed: Tensor,
    scores_ne: Tensor,
    ids_nk: Tensor,
    gates_nk: Tensor,
    total_n: Tensor,
    scale: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight, those that ``output_mask`` asks for."""
    x_nd, weight_ed = x_nd.contiguous(), weight_ed.contiguous()
    given = (None if g is None else g.contiguous() for g in (dgates_nk, dlogits_ne, dscores_ne))
    made = tuple(t.new_empty(t.shape) if on else None for t, on in zip((x_nd, weight_ed), output_mask, strict=True))
    found_kernels().call(
        "route_backward", *x_nd.shape, *weight_ed.shape[:1], ids_nk.shape[1], float(scale), x_nd, weight_ed, *given,
        scores_ne, ids_nk, gates_nk, total_n, *made,
    )  # fmt: skip
    return made


def _fake_forward(x_nd, weight_ed, bias_e, top_k):
    n, e = x_nd.shape[0], weight_ed.shape[0]
    ids_nk = x_nd.new_empty((n, top_k), dtype=torch.int64)
    return x_nd.new_empty(n, e), x_nd.new_empty(n, e), x_nd.new_empty(n, e), ids_nk


def _fake_backward(
    dgates_nk, dlogits_ne, dscores_ne, x_nd, weight_ed, scores_ne, ids_nk, gates_nk, total_n, scale, output_mask
):
    return tuple(t.new_empty(t.shape) if on else None for t, on in zip((x_nd, weight_ed), output_mask, strict=True))


def _forward_flops(x_nd, weight_ed, bias_e, top_k) -> int:
    return 2 * x_nd[0] * x_nd[1] * weight_ed[0]


def _backward_flops(dgates_nk, dlogits_ne, dscores_ne, x_nd, weight_ed, *rest) -> int:
    return 2 * x_nd[0] * x_nd[1] * weight_ed[0] * sum(rest[-1])


_route = operator(
    "route(Tensor x, Tensor weight, Tensor bias, int top_k) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake_forward, _forward_flops,
)  # fmt: skip
_route_backward = operator(
    "route_backward(Tensor? dgates, Tensor? dlogits, Tensor? dscores, Tensor x, Tensor weight, Tensor scores,"
    " Tensor ids, Tensor gates, Tensor total, float scale, bool[2] output_mask) -> (Tensor, Tensor)",
    _backward, _fake_backward, _backward_flops,
)  # fmt: skip
