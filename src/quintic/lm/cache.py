"""What attention remembers of the past: the compressed latent, not keys and values.

Per token and layer, multi-head latent attention needs the normalised latent (``kv_rank`` numbers) and one
rotated key (``qk_rope_dim`` numbers); keys and values of all heads are a linear function of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LatentCache"]


class LatentCache:
    """Preallocated latents of one layer.

    Args:
        batch: Sequences.
        capacity: Tokens that fit.
        kv_rank: Width of the latent.
        rope_dim: Width of the rotated key.
        device: Where to store.
        dtype: Of the stored numbers.
    """

    def __init__(
        self, batch: int, capacity: int, kv_rank: int, rope_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.length = 0
        self.kv_rank = kv_rank
        self._stored = torch.empty(batch, capacity, kv_rank + rope_dim, device=device, dtype=dtype)

    def append(self, latent_btr: Tensor, rope_key_btp: Tensor) -> Tensor:
        """Store new tokens and return everything stored so far: (batch, tokens, kv_rank + rope), latents first."""
        end = self.length + latent_btr.shape[1]
        assert end <= self._stored.shape[1], "the cache is full"
        self._stored[:, self.length : end, : self.kv_rank] = latent_btr
        self._stored[:, self.length : end, self.kv_rank :] = rope_key_btp
        self.length = end
        return self._stored[:, :end]
