"""The weights of a block, prepared for many small steps.

What can be computed once is: gains and shifts of norms and 1 / sqrt(head width) are multiplied into the matrices behind
them, and matrices lie as the product wants them. GELU is u (1 + erf u) with u = x / sqrt(2), its factors in the
matrices too. With one head the mixing matrix goes into the values, whose weights sum to 1, and its bias with it. Keys
and values of earlier tokens lie in one preallocated array that all blocks use in turn (queries too, where they are of
no use, so that a step writes but once); the views of it that a step needs are made once and kept with it. Nothing is
kept on the model: two samplings may run at once, and an exception leaves no trace.

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
    from quintic.flow.inner import Combine

__all__ = ["FoldedBlock", "Room"]

_BY_TOKEN = 4
"""Rows of a batch up to which a room lies token by token."""


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
        layers: Of a block.
        b: Rows of a batch.
        heads: Of a layer.
        n: Tokens.
        e: Numbers of a head.
        like: Has the precision and the device.
    """

    def __init__(self, layers: int, b: int, heads: int, n: int, e: int, like: Tensor) -> None:
        # The array is (layers, 3, b, h, n, e) either way. The numbers of a token side by side let a product write them
        # in place; in larger batches the keys of an image had better lie side by side.
        self.by_token = b == 1 or (heads == 1 and b <= _BY_TOKEN)
        if self.by_token:
            self.array = like.new_empty(layers, n, b, 3, heads, e).permute(0, 3, 2, 4, 1, 5)
        else:
            self.array = like.new_empty(layers, 3, b, heads, n, e)
        self.layers = [(three, *three.flatten(1, 2).unbind(0)) for three in self.array]
        self._places: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def at(self, token: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """By layer, for a step of one token: where it goes, its query, all keys and all values.

        Where it goes is (b, 3 w) in a room that lies token by token, else (b, 3, h, e).
        """
        if token not in self._places:
            self._places[token] = [
                (
                    self._place(room, token),
                    q.narrow(1, token, 1),
                    k.narrow(1, 0, token + 1).mT,
                    v.narrow(1, 0, token + 1),
                )
                for room, q, k, v in self.layers
            ]
        return self._places[token]

    def _place(self, room: Tensor, token: int) -> Tensor:
        place = room.select(3, token).transpose(0, 1)
        return place.view(len(place), -1) if self.by_token else place


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
        leave, self.leave_bias = block.leave.weight, block.leave.bias
        self.inner, self.outputs = block.inner, len(leave)
        if self.inner is not None:
            context = self.inner.context
            leave = torch.cat([leave, context.weight])
            self.leave_bias = torch.cat([self.leave_bias, context.bias])
        self.leave = leave.T.contiguous()

    def solve(self, z: Tensor, said: Tensor, combine: Combine | None = None, out: Tensor | None = None) -> Tensor:
        """Tokens x that become z, by what :meth:`read` or :meth:`step` said of them.

        Args:
            z: (b, k, d) or (b, d).
            said: Of these tokens, or of two passes over them, the one behind the other.
            combine: Makes mu and alpha from those of two passes.
            out: Where to put x; may be z.
        """
        if self.inner is not None:
            x, _ = self.inner.solve(z, said[..., : self.outputs], said[..., self.outputs :], combine)
            return x if out is None else out.copy_(x)
        alpha, mu = (None, said) if self.outputs == z.shape[-1] else said.chunk(2, -1)
        if combine is not None:
            mu, alpha = combine(mu, alpha)
        return torch.add(z, mu, out=out) if alpha is None else torch.addcmul(mu, z, torch.exp(alpha), out=out)

    def read(self, x_bkd: Tensor, start: int) -> Tensor:
        """What tokens ``start`` to ``start + k - 1`` say of the next each, (b, k, ...), for :meth:`solve`.

        Keys and values of tokens before ``start`` are those of earlier calls; those of the given ones are stored.
        """
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
                mixed = mixed.reshape(b, self.heads, k, -1).transpose(1, 2)
                h.add_(layer.mix_bias).addmm_(mixed.reshape(b * k, width), layer.mix)
            self._feed_forward_(h, layer)
        return torch.addmm(self.leave_bias, h, self.leave).view(b, k, -1)

    def step(self, x_bd: Tensor, start: int) -> Tensor:
        """What token ``start`` says of the next, (b, ...); see :meth:`read`.

        As few operations as it takes, since each costs more than its arithmetic at small batches.
        """
        b, width, heads = len(x_bd), self.width, self.heads
        h = torch.addmm(self.starts[start], x_bd, self.enter)
        h_b1w = h.unsqueeze(1)
        for layer, (place, query, keys, values) in zip(self.layers, self.room.at(start), strict=True):
            normed = torch.layer_norm(h, (width,), None, None, layer.eps)
            if self.room.by_token:
                torch.addmm(layer.qkv_bias, normed, layer.qkv, out=place)
            else:
                place.copy_(torch.addmm(layer.qkv_bias, normed, layer.qkv).view(b, 3, heads, -1))
            if self.temperature != 1.0:
                query[len(query) // 2 :] /= self.temperature
            # All keys are earlier ones: two products are quicker than the fused kernel.
            weights = torch.softmax(torch.bmm(query, keys), -1)
            if layer.mix is None:
                h_b1w.baddbmm_(weights, values)
            else:
                h.add_(layer.mix_bias).addmm_(torch.bmm(weights, values).view(b, width), layer.mix)
            self._feed_forward_(h, layer)
        return torch.addmm(self.leave_bias, h, self.leave)

    def _feed_forward_(self, h: Tensor, layer: _FoldedLayer) -> None:
        normed = torch.layer_norm(h, (self.width,), None, None, layer.eps)
        u = torch.addmm(layer.up_bias, normed, layer.up)
        h.add_(layer.down_bias).addmm_(torch.addcmul(u, u, torch.erf(u)), layer.down)
