"""A plain GPT over characters, nanoGPT's recipe for a CPU: the common ground on which optimizers are compared.

Pre-LayerNorm without biases, learned positions, GELU, a head tied to the embedding; 4 layers, width 128, context 64
and batches of 12 are nanoGPT's own numbers. It is written with torch's modules and declares what its parameters are,
as any model may, so that Muon routes it.
"""

from __future__ import annotations

import string
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic.assets import corpus_path
from quintic.core.initial import initialize_
from quintic.core.roles import Constant, Normal, Role, declare

VALIDATION = 65_536
"""Characters at the end of a text that are never trained on."""


class Linear(nn.Linear):
    def __init__(self, d_in: int, d_out: int, std: float = 0.02, row_blocks: int = 1) -> None:
        super().__init__(d_in, d_out, bias=False)
        declare(self, "weight", Role.MATRIX, Normal(std), row_blocks=row_blocks)


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)
        declare(self, "weight", Role.VECTOR, Constant(1.0))


class Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        declare(self, "weight", Role.EMBEDDING, Normal(0.02))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, out_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, row_blocks=3)
        self.out = Linear(width, width, out_std)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int, seed: int) -> None:
        super().__init__()
        self.tokens, self.places = Embedding(len(vocabulary()), width), Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, 0.02 / (2 * layers) ** 0.5) for _ in range(layers))
        self.norm = LayerNorm(width)
        initialize_(self, seed)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, t) int64 -> (b, t, vocabulary)."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean nats a character of (b, context + 1) windows."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@cache
def vocabulary() -> str:
    """Characters of Moby Dick and those that can be typed."""
    return "".join(sorted(set(corpus_path().read_text(encoding="utf-8")) | set(string.printable)))


@cache
def text(name: str) -> Tensor:
    """Characters of a text as uint8: ``moby`` (Moby Dick) or ``python`` (a megabyte of Python's own library)."""
    if name == "moby":
        characters = corpus_path().read_text(encoding="utf-8")
    else:
        assert name == "python"
        folder = Path(sysconfig.get_path("stdlib"))
        parts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
        characters = "".join(parts)[:1_000_000]
    number = {character: i for i, character in enumerate(vocabulary())}
    return torch.from_numpy(np.array([number.get(c, 0) for c in characters], dtype=np.uint8))


def windows(ids: Tensor, starts: np.ndarray, context: int) -> Tensor:
    """(len(starts), context + 1) int64."""
    return torch.stack([ids[start : start + context + 1] for start in starts.tolist()]).long()
