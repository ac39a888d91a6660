"""One more token of every text in few operations, for models so small that calls cost more than arithmetic.

A model's step of one token is hundreds of operators of some microseconds each. Here its weights are prepared once for a
text, which is exact up to rounding:

* the gain of a norm is in the matrix after it;
* a query goes to the latents directly, (W_k' W_q) x, and so does what is attended, (W_out W_v) c; the query's rows and
  the latent's are one matrix, whose result is turned as a whole;
* all experts of a layer, shared and routed, are one feed-forward network, whose hidden units are weighed by the gates:
  by 0 for an expert that was not chosen. That is more arithmetic and far fewer calls.

:func:`suits` tells for which models. The caches are those of the model, so that a prompt can go through the model
itself.

Legend: b batch, d width, h heads, n width without position, p rotated width, r latent, l = r + p, s time of keys,
e experts, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from quintic.lm.block import Block
from quintic.lm.cache import LatentCache
from quintic.lm.mla import LatentAttention
from quintic.lm.model import LanguageModel
from quintic.moe.experts import Experts
from quintic.moe.feedforward import FeedForward
from quintic.moe.layer import MoE

__all__ = ["TokenStep", "suits"]

_BLOCK_NUMBERS = 1 << 20
"""Parameters of a block: four megabytes are read in the time of a few dozen calls."""

Layer = Callable[[Tensor], Tensor]


def suits(model: LanguageModel) -> bool:
    """Whether :class:`TokenStep` can run a model, and is quicker: small blocks in full precision, whole, on a CPU."""
    weight = model.head.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu") or any(isinstance(p, DTensor) for p in model.parameters()):
        return False
    if any(sum(p.numel() for p in block.parameters()) > _BLOCK_NUMBERS for block in model.blocks):
        return False
    layers = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    return not model.config.q_rank and all(
        layer.normalize_experts is None
        and layer.experts.gated
        and layer.experts.activation == "silu"
        and layer.router.offset is None
        and layer.balance.shift((1, 1), layer.router.top_k) is None
        for layer in layers
    )


class TokenStep:
    """A model's logits of the next token, one token at a time.

    Args:
        model: One that :func:`suits`, in evaluation; later changes of its weights are not seen.
        num_ids: Ids from here on get no logits; None for all.
    """

    def __init__(self, model: LanguageModel, num_ids: int | None = None) -> None:
        c = model.config
        self._embedding = model.embedding.weight
        self._layers = [_layer(block, model) for block in model.blocks]
        self._head = (model.head.weight * model.norm.gain)[:num_ids]
        self._eps = c.norm_eps
        still = model.rotation.new_ones(c.context, c.kv_rank // 2)
        self._turns = torch.cat([still, model.rotation[:, c.qk_nope_dim // 2 :]], dim=1)
        self._hidden: Tensor | None = None

    def hide(self, marks: Sequence[Sequence[int]] | None, context: int) -> None:
        """Say which of the cached tokens are padding (mark 0); all later ones are text."""
        self._hidden = None
        if marks is not None:
            hidden = self._head.new_zeros(len(marks), 1, context)
            hidden[:, 0, : len(marks[0])].masked_fill_(torch.tensor(marks, device=hidden.device) == 0, -torch.inf)
            self._hidden = hidden

    def __call__(self, ids_b: Tensor, caches: list[LatentCache]) -> Tensor:
        """(batch,) ids -> (batch, ids) logits; the caches are extended by these tokens."""
        place = caches[0].length
        turn = self._turns[place]
        hidden = None if self._hidden is None else self._hidden[..., : place + 1]
        x = F.embedding(ids_b, self._embedding)
        for (attention, feed_forward), cache in zip(self._layers, caches, strict=True):
            x = feed_forward(attention(x, turn, hidden, cache))
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=self._eps), self._head)


def _layer(block: nn.Module, model: LanguageModel) -> tuple[_Attention, Layer]:
    assert isinstance(block, Block)
    return _Attention(block, model), _feed_forward(block)


class _Attention:
    def __init__(self, block: Block, model: LanguageModel) -> None:
        c = self.config = model.config
        a: LatentAttention = block.attention
        w_k, w_v = a.kv_up.weight.view(c.num_heads, -1, c.kv_rank).split([c.qk_nope_dim, c.v_dim], dim=1)
        w_q, w_turned = a.q.weight.view(c.num_heads, -1, c.d_model).split([c.qk_nope_dim, c.qk_rope_dim], dim=1)
        query_hld = torch.cat([w_k.mT @ w_q, w_turned], dim=1) * (c.qk_nope_dim + c.qk_rope_dim) ** -0.5
        self.w_in = torch.cat([query_hld.flatten(0, 1), a.kv_down.weight]) * block.attention_norm.gain
        w_out_hvd = a.out.weight.t().view(c.num_heads, c.v_dim, c.d_model)
        self.w_out = (w_v.mT @ w_out_hvd).flatten(0, 1)
        self.latent_gain = a.kv_norm.gain

    def __call__(self, x_bd: Tensor, turn: Tensor, hidden: Tensor | None, cache: LatentCache) -> Tensor:
        c, b = self.config, x_bd.shape[0]
        y = F.linear(F.rms_norm(x_bd, (c.d_model,), eps=c.norm_eps), self.w_in).view(b, c.num_heads + 1, -1, 2)
        torch.view_as_complex(y).mul_(turn)
        query_bhl, new_b1l = y.flatten(2).split([c.num_heads, 1], dim=1)
        latent = F.rms_norm(new_b1l[..., : c.kv_rank], (c.kv_rank,), self.latent_gain, c.norm_eps)
        stored_bsl = cache.append(latent, new_b1l[..., c.kv_rank :])
        if hidden is None:
            logits = torch.bmm(query_bhl, stored_bsl.mT)
        else:
            logits = torch.baddbmm(hidden, query_bhl, stored_bsl.mT)
        mixed_bhr = torch.bmm(logits.softmax(dim=-1), stored_bsl[..., : c.kv_rank])
        return torch.addmm(x_bd, mixed_bhr.view(b, -1), self.w_out)


def _feed_forward(block: Block) -> Layer:
    gain, eps = block.ffn_norm.gain, block.ffn_norm.eps
    if isinstance(block.ffn, MoE):
        return _Experts(block.ffn, gain, eps)
    w_in, w_out = _w_in(block.ffn) * gain, block.ffn.down.t()

    def dense(x_bd: Tensor) -> Tensor:
        gate, up = F.linear(F.rms_norm(x_bd, gain.shape, eps=eps), w_in).chunk(2, dim=-1)
        return torch.addmm(x_bd, F.silu(gate).mul_(up), w_out)

    return dense


def _w_in(network: FeedForward | Experts) -> Tensor:
    return network.get_parameter(network.in_name)


class _Experts:
    def __init__(self, layer: MoE, gain: Tensor, eps: float) -> None:
        self.router, self.shape, self.eps = layer.router, gain.shape, eps
        experts, _, f = layer.experts.down.shape
        gates, ups = (part.flatten(0, 1) for part in _w_in(layer.experts).split(f, dim=1))
        down = layer.experts.down.mT.flatten(0, 1)
        units = 0  # shared experts, each as wide as a routed one
        if layer.shared is not None:
            shared_gate, shared_up = _w_in(layer.shared).chunk(2)
            gates, ups = torch.cat([gates, shared_gate]), torch.cat([ups, shared_up])
            down = torch.cat([down, layer.shared.down.t()])
            units = layer.shared.down.shape[1] // f
        self.w_in, self.w_out = torch.cat([layer.router.weight, gates, ups]) * gain, down
        self.sizes = [experts, len(gates), len(ups)]
        self.unchosen = torch.cat([down.new_zeros(1, experts), down.new_ones(1, units)], dim=1)

    def __call__(self, x_bd: Tensor) -> Tensor:
        y = F.linear(F.rms_norm(x_bd, self.shape, eps=self.eps), self.w_in)
        logits, gate, up = y.split(self.sizes, dim=-1)
        ids, gates, *_ = self.router.choose(logits)
        weight_be = self.unchosen.expand(len(x_bd), -1).scatter(1, ids, gates)
        hidden = F.silu(gate).mul_(up).view(*weight_be.shape, -1).mul_(weight_be.unsqueeze(-1))
        return torch.addmm(x_bd, hidden.flatten(1), self.w_out)
