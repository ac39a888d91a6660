"""Post 10699: what k of 16 pieces of a dense feed-forward cost, by how they are chosen."""

from __future__ import annotations

import torch
from benchmarks.plot import Line, draw
from torch import nn

from quintic.moe import DenseSplit, split_dense

SHOWN = {"random": "random", "router": "predicted norms", "norm": "true norms", "best": "best of all subsets",
         "orthogonal": "true norms, were the pieces orthogonal"}  # fmt: skip


def random_split(width: int = 64, hidden: int = 256, experts: int = 16) -> DenseSplit:
    """A random network cut in pieces."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False))
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
    return split_dense(dense, experts, torch.randn(600, width, generator=generator))


def figure() -> str:
    """Error over the number of pieces kept."""
    split = random_split()
    ks = range(1, split.num_experts)
    lines = [Line(name, [float(k) for k in ks], [split.errors[key][k] for k in ks]) for key, name in SHOWN.items()]
    return draw(
        "A random network in 16 pieces: the cost of keeping k of them", lines, x="k",
        y="squared error / squared norm",
    )  # fmt: skip
