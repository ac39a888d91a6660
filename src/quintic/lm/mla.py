"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as Moonlight uses it.

Keys and values of all heads come from one latent c of width r, and position enters through a separate
rotated part that the keys of all heads share:

    c = norm(x W_a),  [k_nope | v] = c W_b,  k = [k_nope | rope(x W_r)],  q = [q_nope | rope(q_rope)]

With ``qk_clip`` the largest logit of every head is kept while training, for :meth:`LatentAttention.clip_qk_` after the
optimizer's step (MuonClip, :mod:`quintic.optim.qk_clip`).

Legend: b batch, t time, s time of keys, h heads, r latent, p rotated width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.core.hooks import hooked
from quintic.core.roles import Normal, Role, declare
from quintic.lm.attention import causal_attention, fits_causal_attention
from quintic.lm.cache import LatentCache
from quintic.lm.config import LMConfig
from quintic.lm.mla_kernel import fits_latent_attention, fused_latent_attention
from quintic.lm.norm import RMSNorm
from quintic.lm.rope import rotate
from quintic.optim.qk_clip import clip_latent_qk_, max_logits, split_heads
from quintic.optim.sharded import local, own_part

__all__ = ["LatentAttention", "Linear"]


class Linear(nn.Module):
    """A matrix (out, in) without bias, declared for matrix optimizers."""

    def __init__(self, d_in: int, d_out: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        declare(self, "weight", Role.MATRIX, Normal(scale / math.sqrt(d_in)))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight)


class LatentAttention(nn.Module):
    """Causal multi-head latent attention.

    Args:
        config: Sizes.
        out_scale: Factor of the initial standard deviation of the output projection.
    """

    largest_logits: Tensor | None = None
    """(heads,) since the last :meth:`clip_qk_`, over all that was seen in training by this process."""

    def __init__(self, config: LMConfig, *, out_scale: float) -> None:
        super().__init__()
        c = self.config = config
        d_q = c.num_heads * (c.qk_nope_dim + c.qk_rope_dim)
        if c.q_rank:
            self.q_down = Linear(c.d_model, c.q_rank)
            self.q_norm = RMSNorm(c.q_rank, c.norm_eps)
        self.q = Linear(c.q_rank or c.d_model, d_q)
        self.kv_down = Linear(c.d_model, c.kv_rank + c.qk_rope_dim)
        self.kv_norm = RMSNorm(c.kv_rank, c.norm_eps)
        self.kv_up = Linear(c.kv_rank, c.num_heads * (c.qk_nope_dim + c.v_dim))
        self.out = Linear(c.num_heads * c.v_dim, c.d_model, scale=out_scale)

    def forward(
        self, x_btd: Tensor, rotation: Tensor, allowed: Tensor | None = None, cache: LatentCache | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x_btd: (batch, time, width).
            rotation: (time, (nope + rope) / 2) complex table of these positions.
            allowed: (batch or 1, 1, time, keys) bool, True where a query may look; None is causal.
            cache: Latents of earlier tokens; extended by these.

        Returns:
            (batch, time, width).
        """
        c = self.config
        b, t, _ = x_btd.shape
        query = self.q(self.q_norm(self.q_down(x_btd)) if c.q_rank else x_btd)
        latent_btr, rope_key_btp = self.kv_down(x_btd).split([c.kv_rank, c.qk_rope_dim], dim=-1)
        latent_btr = self.kv_norm(latent_btr)
        scale, clips = (c.qk_nope_dim + c.qk_rope_dim) ** -0.5, c.qk_clip and self.training
        plain = cache is None and allowed is None and not clips
        if plain and fits_causal_attention(query, latent_btr, rope_key_btp, rotation):
            return self.out(causal_attention(query, self.kv_up(latent_btr), rope_key_btp, rotation, scale))
        # The table leaves the part without position as it is.
        query = rotate(query.view(b, t, c.num_heads, -1).transpose(1, 2), rotation)
        rope_key_btp = rotate(rope_key_btp, rotation[:, c.qk_nope_dim // 2 :])
        if cache is not None:
            stored = cache.append(latent_btr, rope_key_btp)
            if t == 1:
                return self._attend_to_latents(query, stored, allowed)
            latent_btr, rope_key_btp = stored.split([c.kv_rank, c.qk_rope_dim], dim=-1)
        s = latent_btr.shape[1]
        k_nope, value = (
            self.kv_up(latent_btr).view(b, s, c.num_heads, -1).transpose(1, 2).split([c.qk_nope_dim, c.v_dim], dim=-1)
        )
        key = torch.cat([k_nope, rope_key_btp.unsqueeze(1).expand(-1, c.num_heads, -1, -1)], dim=-1)
        if clips:
            found = max_logits(query, key, allowed=allowed)
            self.largest_logits = found if self.largest_logits is None else torch.maximum(self.largest_logits, found)
        # The fused kernels want equal widths; zero columns change nothing.
        pad = key.shape[-1] - c.v_dim
        if pad > 0:
            value = F.pad(value, (0, pad))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None and t > 1, scale=scale
        )
        return self.out(mixed[..., : c.v_dim].transpose(1, 2).reshape(b, t, -1))

    def add_to_stream(self, x_btd: Tensor, norm: RMSNorm, rotation: Tensor) -> Tensor | None:
        """x + attention(norm(x)), causal, in one step; None where that cannot be (:mod:`quintic.lm.mla_kernel`).

        Args:
            x_btd: (batch, time, width) residual stream.
            norm: The norm before attention.
            rotation: As :meth:`forward` takes it.
        """
        c, modules = self.config, (norm, self.q, self.kv_down, self.kv_norm, self.kv_up, self.out)
        plain = not (c.q_rank or (c.qk_clip and self.training) or hooked(self, *modules))
        if not plain or {type(m) for m in modules} != {RMSNorm, Linear}:  # another may stand in the place of one
            return None
        weights = [m.gain if isinstance(m, RMSNorm) else m.weight for m in modules]
        if not fits_latent_attention(x_btd, rotation, weights, c):
            return None
        return fused_latent_attention(x_btd, rotation, weights, (norm.eps, self.kv_norm.eps), c)

    def _attend_to_latents(self, query_bh1e: Tensor, stored_bsl: Tensor, allowed: Tensor | None) -> Tensor:
        """One new token: keys and values are linear in the latents, so queries go to them, W_k' q, and not they to W_k.

        That takes work of order tokens x heads x kv_rank instead of forming every key and value again.
        """
        c, b = self.config, query_bh1e.shape[0]
        w_k, w_v = self.kv_up.weight.view(c.num_heads, -1, c.kv_rank).split([c.qk_nope_dim, c.v_dim], dim=1)
        q_nope, q_rope = query_bh1e.squeeze(2).split([c.qk_nope_dim, c.qk_rope_dim], dim=-1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_k).transpose(0, 1)
        weights = torch.cat([q_latent, q_rope], dim=-1) @ stored_bsl.mT
        weights = weights * (c.qk_nope_dim + c.qk_rope_dim) ** -0.5
        if allowed is not None:
            weights = weights.masked_fill(~allowed[:, :, 0], -torch.inf)
        mixed = weights.softmax(dim=-1) @ stored_bsl[..., : c.kv_rank]
        return self.out(torch.bmm(mixed.transpose(0, 1), w_v.mT).transpose(0, 1).reshape(b, 1, -1))

    def clip_qk_(self, largest: Tensor) -> Tensor:
        """Shrink the queries and keys of heads with logits above ``qk_clip``, and forget the logits.

        Args:
            largest: (heads,) ``largest_logits``, over all processes.

        Returns:
            (heads,) the factor on the logits of each head; 1 where nothing was done.
        """
        c = self.config
        self.largest_logits = None
        # The factors of all rows first: what lies here of a divided weight may begin within a head.
        q_rows, kv_rows = (_row_factors(layer.weight) for layer in (self.q, self.kv_up))
        q_nope, q_rope = split_heads(q_rows, c.num_heads, c.qk_nope_dim, c.qk_rope_dim)
        k_nope, _ = split_heads(kv_rows, c.num_heads, c.qk_nope_dim, c.v_dim)
        gamma = clip_latent_qk_(q_nope, q_rope, k_nope, largest, c.qk_clip)
        for layer, rows in ((self.q, q_rows), (self.kv_up, kv_rows)):
            local(layer.weight.detach()).mul_(own_part(rows, layer.weight))
        return gamma


def _row_factors(weight: Tensor) -> Tensor:
    """(rows, 1) ones, in float32 at least: half precision is rounded once."""
    return torch.ones(len(weight), 1, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
