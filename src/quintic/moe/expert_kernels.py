"""The routed sum by the C kernels of ``experts.c``: float32 on a CPU that has them, with silu, gelu_tanh or relu.

Rows are sorted by expert without padding, so a run's layout differs from that of :mod:`quintic.moe.dispatch`; what is
kept for the backward pass has the same meaning and the same size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.core.kernels import Kernels, fits_kernels, found_kernels, load_kernels

__all__ = ["backward", "dense_backward", "dense_forward", "forward", "kernels_for"]

_KINDS = ("silu", "gelu_tanh", "relu")


def kernels_for(activation: str, *tensors: Tensor, normalize: bool = False) -> Kernels | None:
    """The kernels, if there are any and they compute this."""
    known = activation in _KINDS and not normalize
    return load_kernels() if known and fits_kernels(*tensors) else None


def forward(
    kernels: Kernels,
    x_nd: Tensor,
    ids_nk: Tensor,
    gates_nk: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    plus_nd: Tensor | None,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """y_n, and ``plus_nd`` added; fills what is kept: h_rh, row_nk, token_r and counts_e.

    Raises:
        IndexError: An id is no expert's.
    """
    x_nd, ids_nk, gates_nk, w_in, w_out = (t.contiguous() for t in (x_nd, ids_nk, gates_nk.float(), w_in, w_out))
    h_rh, row_nk, token_r, counts_e = kept
    y_nd, sizes = torch.empty_like(x_nd), _sizes(ids_nk, w_in, w_out)
    if kernels.call(
        "experts_forward", *sizes, _KINDS.index(activation),
        x_nd, ids_nk, gates_nk, w_in, w_out, counts_e, row_nk, token_r, h_rh,
        None if plus_nd is None else plus_nd.contiguous(), y_nd,
    ):  # fmt: skip
        raise IndexError(f"ids_nk has values from {ids_nk.min()} to {ids_nk.max()}; there are {sizes[-1]} experts")
    return y_nd


def backward(
    kernels: Kernels,
    dy_nd: Tensor,
    x_nd: Tensor,
    gates_nk: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gates, w_in and w_out; of x, w_in and w_out only those that ``output_mask`` asks for."""
    dtype = gates_nk.dtype
    dy_nd, x_nd, gates_nk, w_in, w_out = (
        t.contiguous() for t in (dy_nd.to(x_nd.dtype), x_nd, gates_nk.float(), w_in, w_out)
    )
    h_rh, row_nk, token_r, counts_e = kept
    needs_x, needs_in, needs_out = output_mask
    dgates_nk = torch.empty_like(gates_nk)
    dx_nd, dw_in, dw_out = (
        torch.empty_like(t) if needed else None for t, needed in ((x_nd, needs_x), (w_in, needs_in), (w_out, needs_out))
    )
    kernels.call(
        "experts_backward", *_sizes(row_nk, w_in, w_out), _KINDS.index(activation),
        x_nd, gates_nk, w_in, w_out, counts_e, row_nk, token_r, h_rh, dy_nd, dx_nd, dgates_nk, dw_in, dw_out,
    )  # fmt: skip
    return dx_nd, dgates_nk.to(dtype), dw_in, dw_out


def dense_forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, plus: Tensor | None, h_nh: Tensor, y: Tensor
) -> None:
    """One expert for all rows, in their order and with gates of 1; writes h and y."""
    x, w_in, w_out = (t.contiguous() for t in (x, w_in, w_out))
    found_kernels().call(
        "experts_forward", *_dense_sizes(x, w_in, w_out), _KINDS.index(activation),
        x, None, None, w_in, w_out, None, None, None, h_nh, None if plus is None else plus.contiguous(), y,
    )  # fmt: skip


def dense_backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    h_nh: Tensor,
    activation: str,
    dx: Tensor | None,
    dw_in: Tensor | None,
    dw_out: Tensor | None,
) -> None:
    """Writes those gradients that are not None."""
    dy, x, w_in, w_out = (t.contiguous() for t in (dy, x, w_in, w_out))
    found_kernels().call(
        "experts_backward", *_dense_sizes(x, w_in, w_out), _KINDS.index(activation),
        x, None, w_in, w_out, None, None, None, h_nh, dy, dx, None, dw_in, dw_out,
    )  # fmt: skip


def _dense_sizes(x: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[int, ...]:
    return x.numel() // x.shape[-1], 1, *w_out.shape, len(w_in), 1


def _sizes(ids_nk: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[int, ...]:
    """n, k, d, f, h and experts."""
    return (*ids_nk.shape, *w_out.shape[1:], w_in.shape[1], len(w_in))
