"""The language model: embedding, blocks, norm, untied head (DeepSeek-V3 architecture, arXiv 2412.19437)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpointed

from quintic.core import DataError
from quintic.core.initial import initialize_
from quintic.core.roles import Normal, Role, declare
from quintic.core.table import ModuleWithTable
from quintic.lm.block import Block
from quintic.lm.cache import LatentCache
from quintic.lm.config import LMConfig
from quintic.lm.cross_entropy import linear_cross_entropy
from quintic.lm.norm import RMSNorm
from quintic.lm.rope import rotation_table
from quintic.moe.layer import MoE

__all__ = ["LanguageModel"]


class Embedding(nn.Module):
    """A table of rows, one per token."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        declare(self, "weight", Role.EMBEDDING, Normal(1.0))

    def extra_repr(self) -> str:
        """Sizes."""
        return "{} x {}".format(*self.weight.shape)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        return F.embedding(ids, self.weight)


class Head(nn.Module):
    """Logits of every token of the vocabulary."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        # Small logits: training starts at the loss of a uniform guess.
        declare(self, "weight", Role.HEAD, Normal(0.1 / math.sqrt(d_model)))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary)."""
        return F.linear(x, self.weight)


class LanguageModel(ModuleWithTable):
    """A causal language model with latent attention and mixture-of-experts blocks.

    Args:
        config: Sizes.
        seed: Initial weights are a pure function of (seed, parameter name, position). None draws a seed from torch's
            default generator, so that ``torch.manual_seed`` governs them as it does those of ``torch.nn``.
        initialize: False leaves the weights to :func:`quintic.core.initial.initialize_` or a checkpoint.

    Example:
        >>> model = LanguageModel(LMConfig(), seed=0)
        >>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 264])
    """

    rotation: Tensor
    table_name = "rotation"

    def __init__(self, config: LMConfig, *, seed: int | None = None, initialize: bool = True) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, index) for index in range(c.num_layers))
        for block in self.blocks:
            if isinstance(block.ffn, MoE):  # the configuration says what was computed: others build from it
                self.config = replace(c, route_scale=block.ffn.router.scale)
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = Head(c.vocab_size, c.d_model)
        self.register_table()
        if initialize:
            initialize_(self, seed)

    def compute_table(self) -> Tensor:
        """The turns of :mod:`quintic.lm.rope`."""
        c = self.config
        return rotation_table(c.context, c.qk_rope_dim, c.rope_theta, still=c.qk_nope_dim)

    def forward(
        self,
        ids: Tensor,
        *,
        documents: Tensor | None = None,
        counted: Tensor | None = None,
        cache: list[LatentCache] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, or the loss against targets.

        Args:
            ids: (batch, time) int64, time at most ``config.context`` (with a cache: cached and new together).
            documents: (batch, time) integers, with a cache (batch, cached + time); attention stays within equal
                numbers. None crosses documents.
            counted: (batch, time) bool; False positions (padding) do not count as expert load.
            cache: One :class:`LatentCache` per block, from :meth:`new_cache`; extended by these tokens.
            targets: (batch, time) int64, -1 where nothing is predicted. The logits are then never whole in memory.

        Returns:
            (batch, time, vocabulary); with targets the summed cross-entropy in nats, 0-d.

        Raises:
            DataError: The sequence is longer than the context.
        """
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.context:
            raise DataError(f"sequence of {end} tokens is longer than the model's context of {self.config.context}")
        allowed = None
        if documents is not None or (start and ids.shape[1] > 1):
            place = torch.arange(end, device=ids.device)
            allowed = (place[start:, None] >= place[None, :])[None, None]
            if documents is not None:
                allowed = allowed & (documents[:, None, start:, None] == documents[:, None, None, :])
        x = self.embedding(ids)
        for index, block in enumerate(self.blocks):
            inputs = (x, self.rotation[start:end], allowed, counted, cache[index] if cache else None)
            if self.config.checkpoint and torch.is_grad_enabled():
                x = checkpointed(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        x = self.norm(x)
        return self.head(x) if targets is None else linear_cross_entropy(x, self.head.weight, targets)

    def new_cache(self, batch: int = 1) -> list[LatentCache]:
        """Empty caches, one per block, for ``config.context`` tokens."""
        c, weight = self.config, self.embedding.weight
        return [
            LatentCache(batch, c.context, c.kv_rank, c.qk_rope_dim, weight.device, weight.dtype) for _ in self.blocks
        ]

    def num_parameters(self) -> tuple[int, int]:
        """(total, active): a token visits only k of the routed experts."""
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for layer in self.modules():
            if isinstance(layer, MoE):
                stack = sum(p.numel() for p in layer.experts.parameters())
                experts = layer.router.weight.shape[0]
                idle += stack // experts * (experts - layer.router.top_k)
        return total, total - idle

    def flops_per_token(self, time: int) -> float:
        """FLOPs of forward and backward per token of a window: 6 per active matrix element, and attention.

        The embedding is a look-up and costs nothing; half of the attention products are masked away.
        """
        c = self.config
        active = self.num_parameters()[1] - self.embedding.weight.numel()
        per_key = c.qk_nope_dim + c.qk_rope_dim + c.v_dim
        return 6.0 * active + 3.0 * c.num_layers * c.num_heads * time * per_key
