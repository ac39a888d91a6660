"""How much a forward pass keeps for the backward pass, counted from the shapes.

Kept per token and layer: the input and the normalised input of both halves (4 d); queries, keys, values and the
attended values of every head; latents before and after their norm; what the feed-forward's own functions save. The
kernels of :mod:`quintic.lm.mla_kernel` keep less: no normalised inputs, one copy of the keys' shared part, no padding.
"""

from __future__ import annotations

from dataclasses import replace

from quintic.lm.config import LMConfig

__all__ = ["saved_numbers_per_token"]


def saved_numbers_per_token(config: LMConfig) -> float:
    """Numbers kept for the backward pass, per token, without the logits.

    With ``checkpoint`` these are the inputs of the blocks, and what the largest block keeps while it is computed again.

    Args:
        config: Sizes.

    Example:
        >>> saved_numbers_per_token(LMConfig.preset("laptop"))
        8136.0
    """
    c = config
    if c.checkpoint:
        dense = replace(c, checkpoint=False, num_layers=1, num_dense_layers=1)
        blocks = [dense] if c.num_dense_layers else []
        blocks += [replace(dense, num_dense_layers=0)] if c.num_layers > c.num_dense_layers else []
        return c.num_layers * c.d_model + max(saved_numbers_per_token(block) for block in blocks)
    qk = c.qk_nope_dim + c.qk_rope_dim
    # Values narrower than keys are padded for the fused kernel, and the padded and the cut ones are both kept.
    head = 4 * qk + c.v_dim if qk > c.v_dim else 2 * qk + c.qk_nope_dim + 2 * c.v_dim
    attention = 4 * c.d_model + c.num_heads * (head + 1) + 2 * c.kv_rank + 2 * c.q_rank
    dense = 3 * c.d_ff
    experts = c.top_k * (2 * c.d_expert + 8) + 3 * c.num_shared * c.d_expert + c.num_experts
    routed_layers = c.num_layers - c.num_dense_layers
    return float(c.num_layers * attention + c.num_dense_layers * dense + routed_layers * experts + 2 * c.d_model)
