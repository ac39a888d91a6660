"""The weights of a block, prepared for many small steps.

What can be computed once is: gains and shifts of norms and 1 / sqrt(head width) are multiplied into the matrices behind
them, and matrices lie as the product wants them. GELU is u (1 + erf u) with u = x / sqrt(2), its factors in the
matrices too. With one head the mixing matrix goes into the values, whose weights sum to 1, and its bias with it. Keys
and values of earlier tokens lie in one preallocated array that all blocks use in turn (queries too, where they are of no use, so that a step writes
but once); the views of it that a step of one token needs are made at the first block and kept with it. Nothing is kept on the model: two samplings may run at once,
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

__all__ = ["FoldedBlock", "Room"]


class _FoldedLayer(NamedTuple):
    """Matrices are (in, out). With one head ``mix`` is None and in the values."""

    qkv: Tensor
    qkv_bias: Tensor
    mix: Tensor | None
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
    mix = layer.mix.weight.T.contiguous()
    if layer.heads == 1:
        qkv[:, 2 * width :] = qkv[:, 2 * width :] @ mix
        qkv_bias[2 * width :] = torch.addmv(layer.mix.bias, layer.mix.weight, qkv_bias[2 * width :])
        mix = None
    up, up_bias = _behind_norm(layer.up, layer.mlp_norm)
    half = math.sqrt(0.5)
    return _FoldedLayer(
        qkv, qkv_bias, mix, layer.mix.bias, up * half, up_bias * half,
        layer.down.weight.T.contiguous() * half, layer.down.bias, layer.attention_norm.eps,
    )  # fmt: skip


class Room:
    """Queries, keys and values of all tokens, for one block at a time.

    Args:
        array: (layers, 3, b, h, n, e); what is in it is overwritten.
    """

    def __init__(self, array: Tensor) -> None:
        self.array = array
        self.layers = [(three, *three.flatten(1, 2).unbind(0)) for three in array]
        self._places: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def at(self, token: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """By layer, for a step of one token: where it goes (3, b, h, e), its query, all keys and all values."""
        if token not in self._places:
            self._places[token] = [
                (room.select(3, token), q.narrow(1, token, 1), k.narrow(1, 0, token + 1).mT, v.narrow(1, 0, token + 1))
                for room, q, k, v in self.layers
            ]
        return self._places[token]


class FoldedBlock:
    """A block that reads tokens a few at a time.

    Args:
        block: Whose weights to use.
        rows: (b,) of its class table, or None.
        room: For queries, keys and values.
        mask: (n, n) lower triangle, bool.
        temperature: Of attention, for the second half of the batch.
    """

    def __init__(
        self, block: FlowBlock, rows: Tensor | None, room: Room, mask: Tensor, temperature: float = 1.0
    ) -> None:
        self.layers = [_fold(layer) for layer in block.layers]  # pyright: ignore[reportArgumentType]
        _, _, b, self.heads, n, e = room.array.shape
        self.width = self.heads * e
        self.room = room
        self.mask, self.temperature = mask, temperature
        self.enter = block.enter.weight.T.contiguous()
        start = block.position + block.enter.bias
        self.start = start.expand(b, n, -1) if rows is None else start + block.classes[rows][:, None]
        self.starts = self.start.unbind(1)
        self.leave, self.leave_bias = block.leave.weight.T.contiguous(), block.leave.bias
        self.volume_preserving = block.volume_preserving

    def coefficients(self, x_bkd: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """mu and alpha (b, k, d) of tokens ``start + 1`` to ``start + k`` from tokens ``start`` to ``start + k - 1``.

        Keys and values of tokens before ``start`` are those of earlier calls; those of the given ones are stored.
        """
        b, k, d = x_bkd.shape
        if k == 1:
            out = self._step(x_bkd.select(1, 0), start).unsqueeze(1)
        else:
            out = self._window(x_bkd, start)
        if self.volume_preserving:
            return out, None
        return out.narrow(2, d, d), out.narrow(2, 0, d)

    def _step(self, x_bd: Tensor, start: int) -> Tensor:
        """One token: as few operations as it takes, since each costs more than its arithmetic at small batches."""
        b, width, heads = len(x_bd), self.width, self.heads
        h = torch.addmm(self.starts[start], x_bd, self.enter)
        for layer, (place, query, keys, values) in zip(self.layers, self.room.at(start), strict=True):
            normed = torch.layer_norm(h, (width,), None, None, layer.eps)
            qkv = torch.addmm(layer.qkv_bias, normed, layer.qkv).view(b, 3, heads, -1)
            if self.temperature != 1.0:
                qkv[b // 2 :, 0] /= self.temperature
            place.copy_(qkv.transpose(0, 1))
            # All keys are earlier ones: two products are quicker than the fused kernel.
            weights = torch.softmax(torch.bmm(query, keys), -1)
            if layer.mix is None:
                h.unsqueeze(1).baddbmm_(weights, values)
            else:
                h.add_(layer.mix_bias).addmm_(torch.bmm(weights, values).view(b, width), layer.mix)
            self._feed_forward_(h, layer)
        return torch.addmm(self.leave_bias, h, self.leave)

    def _window(self, x_bkd: Tensor, start: int) -> Tensor:
        """Some tokens side by side."""
        b, k, d = x_bkd.shape
        width, end = self.width, start + k
        h = torch.addmm(self.start.narrow(1, start, k).reshape(b * k, width), x_bkd.reshape(b * k, d), self.enter)
        mask = self.mask[start:end, :end]
        for layer, (room, queries, keys, values) in zip(self.layers, self.room.layers, strict=True):
            normed = torch.layer_norm(h, (width,), None, None, layer.eps)
            qkv = torch.addmm(layer.qkv_bias, normed, layer.qkv).view(b, k, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            if self.temperature != 1.0:
                qkv[0, b // 2 :] /= self.temperature
            room.narrow(3, start, k).copy_(qkv)
            mixed = F.scaled_dot_product_attention(
                queries.narrow(1, start, k), keys.narrow(1, 0, end), values.narrow(1, 0, end), attn_mask=mask, scale=1.0
            )
            if layer.mix is None:
                h.add_(mixed.reshape(b * k, width))
            else:
                mixed = mixed.view(b, self.heads, k, -1).transpose(1, 2)
                h.add_(layer.mix_bias).addmm_(mixed.reshape(b * k, width), layer.mix)
            self._feed_forward_(h, layer)
        return torch.addmm(self.leave_bias, h, self.leave).view(b, k, -1)

    def _feed_forward_(self, h: Tensor, layer: _FoldedLayer) -> None:
        normed = torch.layer_norm(h, (self.width,), None, None, layer.eps)
        u = torch.addmm(layer.up_bias, normed, layer.up)
        h.add_(layer.down_bias).addmm_(torch.addcmul(u, u, torch.erf(u)), layer.down)
