"""Post 10648: what each weight decay leaves of the singular values of a matrix that Muon moves."""

from __future__ import annotations

import torch
from benchmarks.plot import Line, draw
from torch import Tensor, nn

from quintic import Muon

SIDE, SHOWN, STEPS, LR, DECAY = 48, 40, 1500, 0.02, 1.0
ARMS = {
    "no decay": {"weight_decay": 0.0},
    "Frobenius": {"weight_decay": DECAY},
    "spectral": {"weight_decay": DECAY, "decay": "spectral"},
    "spectral, rank 4": {"weight_decay": DECAY, "decay": "spectral", "decay_rank": 4},
}


def spectrum(**settings: float | str) -> Tensor:
    """Singular values after many steps along noisy gradients that share a small mean of rank 2."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, 2, generator=generator) for _ in range(2))
    mean = 0.02 * left @ right.T
    weight = nn.Parameter(torch.randn(SIDE, SIDE, generator=generator) * SIDE**-0.5)
    optimizer = Muon([weight], lr=LR, scale="none", **settings)  # pyright: ignore[reportArgumentType]
    for _ in range(STEPS):
        weight.grad = mean + torch.randn(SIDE, SIDE, generator=generator)
        optimizer.step()
    return torch.linalg.svdvals(weight.detach())


def figure() -> str:
    """Singular values by their place, largest first."""
    place = [float(i) for i in range(1, SHOWN + 1)]
    lines = [Line(name, place, spectrum(**settings)[:SHOWN].tolist()) for name, settings in ARMS.items()]
    return draw(
        f"Singular values after {STEPS} steps of Muon along noisy gradients",
        lines, x="place (1 is the largest)", y="singular value", log_x=True, log_y=True, marks=False,
    )  # fmt: skip
