"""Cross-entropy of a linear head without its logits in memory.

With logits z = x W' and p = softmax(z), the loss of a token with target y is log sum exp z - z_y and its gradient in z
is p - e_y. So a chunk of tokens needs its logits once: loss, gradient in x and gradient in W are formed on the spot and
the logits are dropped. For a vocabulary of 160,000 and 8,192 tokens that is 82 MB at a time instead of 5 GB, and the
number of products is the same. On a CPU a chunk of a small vocabulary stays in the cache. The total is a sum, so that
its incoming gradient is one number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy", "rows_at_a_time"]

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
"""Logits in memory at a time, by type of device."""
_OTHERWISE = 1 << 22
_LEAST_ROWS = 128
"""Tokens at a time, however large the vocabulary: the whole head is read for every chunk."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore: int = -1) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(x W') against targets, in nats.

    Args:
        x: (..., width).
        weight: (vocabulary, width) of the head.
        targets: (...) int64; ``ignore`` counts nothing.
        ignore: The mark of tokens that are not predicted.

    Returns:
        0-d, float32 or wider; once differentiable in ``x`` and ``weight``. Under autocast products run in its dtype.

    Example:
        >>> x, w = torch.zeros(3, 4), torch.zeros(5, 4)
        >>> float(linear_cross_entropy(x, w, torch.tensor([0, 4, -1])) / torch.log(torch.tensor(5.0)))
        2.0
    """
    if not torch.is_grad_enabled():  # an autograd function is told what requires a gradient, not whether one is kept
        x, weight = x.detach(), weight.detach()
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    total: Tensor = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), ignore, dtype)  # type: ignore[assignment]
    return total


def rows_at_a_time(vocabulary: int, device_type: str) -> int:
    """Tokens whose logits are in memory together.

    Example:
        >>> rows_at_a_time(163840, "cuda"), rows_at_a_time(1024, "cpu")
        (128, 256)
    """
    return max(_LEAST_ROWS, _CHUNK_ELEMENTS.get(device_type, _OTHERWISE) // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, ignore: int, dtype: torch.dtype | None
    ) -> Tensor:
        fast = dtype or x_nd.dtype
        w = weight_vd.to(fast)
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x_nd.device)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_nd) if needs_x else None
        grad_w = torch.zeros_like(weight_vd, dtype=wide) if needs_w else None
        vocabulary = weight_vd.shape[0]
        size = rows_at_a_time(vocabulary, x_nd.device.type)
        scratch = x_nd.new_empty(min(size, len(x_nd)), vocabulary, dtype=wide)
        for start in range(0, len(x_nd), size):
            rows = slice(start, start + size)
            x, targets = x_nd[rows].to(fast), targets_n[rows]
            counted = (targets != ignore).unsqueeze(1)
            places = torch.where(counted, targets.unsqueeze(1), 0)
            z = scratch[: len(x)]
            if fast == wide:
                torch.mm(x, w.t(), out=z)
            else:
                z.copy_(x @ w.t())
            largest = z.amax(1, keepdim=True)
            own = z.gather(1, places).sub_(largest)
            exponentials = z.sub_(largest).exp_()
            sums = exponentials.sum(1, keepdim=True)
            total += ((sums.log() - own) * counted).sum()
            if not (needs_x or needs_w):
                continue
            grad = exponentials.mul_(counted / sums).scatter_add_(1, places, -counted.to(wide)).to(fast)
            if grad_x is not None:
                grad_x[rows] = grad @ w
            if grad_w is not None:
                # bfloat16 products are added up in float32.
                grad_w = grad_w.addmm_(grad.t(), x) if fast == wide else grad_w.add_(grad.t() @ x)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight_vd.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_w = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_w is None else (grad_w * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
