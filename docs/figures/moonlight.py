"""Post 10739: the size of an update by the shape of its matrix, for each factor in front of msign."""

from __future__ import annotations

import torch
from benchmarks.plot import Line, draw
from torch import nn

from quintic import Muon

WIDTHS = (32, 64, 128, 256, 512)
SCALES = ("moonlight", "keller", "mup")


def update_rms(rows: int, columns: int, scale: str) -> float:
    """RMS of one step of Muon per unit of learning rate, on a gradient of noise."""
    weight = nn.Parameter(torch.zeros(rows, columns))
    weight.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0, scale=scale).step()
    return float(weight.detach().square().mean().sqrt())


def adam_rms(steps: int = 200) -> float:
    """The same for Adam after many gradients of noise, divided by its own learning rate."""
    weight = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    before = weight.detach().clone()
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return float((weight.detach() - before).square().mean().sqrt())


def figure() -> str:
    """Update RMS over the width of a d x 4d matrix."""
    lines = [Line(scale, [float(d) for d in WIDTHS], [update_rms(d, 4 * d, scale) for d in WIDTHS]) for scale in SCALES]
    return draw(
        "RMS of Muon's update of a d x 4d matrix, per unit of learning rate",
        lines, x="d", y="RMS of the update / learning rate", log_x=True, log_y=True,
        rules={"Adam on noise": adam_rms()},
    )  # fmt: skip
