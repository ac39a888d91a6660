"""The weights of a block, prepared for many small steps.

What can be computed once is: gains and shifts of norms and 1 / sqrt(head width) are multiplied into the matrices behind
them, and matrices lie as the product wants them. GELU is u (1 + erf u) with u = x / sqrt(2), its factors in the
matrices too. Keys and values of earlier tokens lie in one preallocated array that all blocks use in turn (queries too,
where they are of no use, so that a step writes but once). Nothing is kept on the model: two samplings may run at once,
and an exception leaves no trace.

Shapes: b batch (with guidance twice the images: with class, then without), k tokens of a step, n of the image, w width,
h heads, e = w / h.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from quintic.flow.block import FlowBlock, Layer, Linear

__all__ = ["FoldedBlock"]


class _FoldedLayer(NamedTuple):
    """Matrices are (in, out)."""

    qkv: Tensor
    qkv_bias: Tensor
    mix: Tensor
    mix_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    eps: float


def _behind_norm(linear: Linear, norm: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return (linear.weight * norm.weight).T.contiguous(), linear.bias + linear.weight @ norm.bias


def _fold(layer: Layer) -> _FoldedLayer:
    qkv, qkv_bias = _behind_norm(layer.qkv, layer.attention_norm)
    width = len(qkv)
    scale = 1.0 / math.sqrt(width // layer.heads)
    qkv[:, :width] *= scale
    qkv_bias[:width] *= scale
    up, up_bias = _behind_norm(layer.up, layer.mlp_norm)
    half = math.sqrt(0.5)
    return _FoldedLayer(
        qkv, qkv_bias, layer.mix.weight.T.contiguous(), layer.mix.bias, up * half, up_bias * half,
        layer.down.weight.T.contiguous() * half, layer.down.bias, layer.attention_norm.eps,
    )  # fmt: skip


class FoldedBlock:
    """A block that reads tokens a few at a time.

    Args:
        block: Whose weights to use.
        rows: (b,) of its class table, or None.
        room: (layers, 3, b, h, n, e) for queries, keys and values; what is in it is overwritten.
        mask: (n, n) lower triangle, bool.
        temperature: Of attention, for the second half of the batch.
    """

    def __init__(
        self, block: FlowBlock, rows: Tensor | None, room: Tensor, mask: Tensor, temperature: float = 1.0
    ) -> None:
        self.layers = [_fold(layer) for layer in block.layers]  # pyright: ignore[reportArgumentType]
        _, _, b, self.heads, n, e = room.shape
        self.width = self.heads * e
        self.rooms = [(three, *three.flatten(1, 2).unbind(0)) for three in room]
        self.mask, self.temperature = mask, temperature
        self.enter = block.enter.weight.T.contiguous()
        start = block.position + block.enter.bias
        self.start = start.expand(b, n, -1) if rows is None else start + block.classes[rows][:, None]
        self.leave, self.leave_bias = block.leave.weight.T.contiguous(), block.leave.bias
        self.volume_preserving = block.volume_preserving

    def coefficients(self, x_bkd: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """mu and alpha (b, k, d) of tokens ``start + 1`` to ``start + k`` from tokens ``start`` to ``start + k - 1``.

        Keys and values of tokens before ``start`` are those of earlier calls; those of the given ones are stored.
        """
        b, k, d = x_bkd.shape
        width, end = self.width, start + k
        h = torch.addmm(self.start.narrow(1, start, k).reshape(b * k, width), x_bkd.reshape(b * k, d), self.enter)
        for layer, (room, queries, keys, values) in zip(self.layers, self.rooms, strict=True):
            normed = torch.native_layer_norm(h, (width,), None, None, layer.eps)[0]
            qkv = torch.addmm(layer.qkv_bias, normed, layer.qkv).view(b, k, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            if self.temperature != 1.0:
                qkv[0, b // 2 :] /= self.temperature
            room.narrow(3, start, k).copy_(qkv)
            mixed = self._attend(queries.narrow(1, start, k), keys.narrow(1, 0, end), values.narrow(1, 0, end), start)
            if k > 1:
                mixed = mixed.view(b, self.heads, k, -1).transpose(1, 2)
            h.add_(layer.mix_bias).addmm_(mixed.reshape(b * k, width), layer.mix)
            normed = torch.native_layer_norm(h, (width,), None, None, layer.eps)[0]
            u = torch.addmm(layer.up_bias, normed, layer.up)
            h.add_(layer.down_bias).addmm_(torch.addcmul(u, u, torch.erf(u)), layer.down)
        out = torch.addmm(self.leave_bias, h, self.leave).view(b, k, -1)
        if self.volume_preserving:
            return out, None
        return out.narrow(2, d, d), out.narrow(2, 0, d)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """(b h, k, e) from as many queries and the (b h, all, e) keys and values up to the last of them."""
        k = queries.shape[1]
        if k == 1:  # all keys are earlier ones: two products are quicker than the fused kernel
            return torch.bmm(torch.softmax(torch.bmm(queries, keys.mT), -1), values)
        mask = self.mask[start : start + k, : start + k]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
