"""Post 10667: one block is not enough; bits per dimension of flows that spend the same layers on more blocks."""

from __future__ import annotations

import torch
from benchmarks.plot import Line, draw
from torch import Tensor

from quintic import Muon, TarFlow, clip_grad_norm_
from quintic.data.drawings import draw as draw_shapes
from quintic.flow.likelihood import dequantise

SIDE, BATCH, STEPS, EVERY = 8, 64, 300, 30
ARMS = {"1 block of 4 layers": (1, 4), "2 blocks of 2": (2, 2), "4 blocks of 1": (4, 1)}


def shapes(count: int, label: str) -> Tensor:
    """(count, 1, SIDE, SIDE) levels 0 to 255."""
    images, _ = draw_shapes(count, SIDE, 1, seed=0, label=label)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype("int64"))


def bits(blocks: int, layers: int, steps: int = STEPS) -> list[float]:
    """Bits per dimension of shapes not trained on, every so many steps."""
    train, held = shapes(6000, "train"), shapes(500, "validation")
    flow = TarFlow(
        (1, SIDE, SIDE), patch=2, width=48, head_width=24, blocks=blocks, layers=layers, noise="uniform", seed=0
    )
    optimizer = Muon(flow, lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1.0 - step / steps)
        part = torch.randint(len(train), (BATCH,), generator=generator)
        x = dequantise(train[part], torch.rand(BATCH, 1, SIDE, SIDE, generator=generator), 256)
        optimizer.zero_grad()
        (-flow.log_prob(x).mean() / flow.dims).backward()
        clip_grad_norm_(flow)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                found.append(float(flow.bits_per_dim(held).mean()))
    return found


def figure() -> str:
    """Bits per dimension over steps."""
    steps = [float(EVERY * (i + 1)) for i in range(STEPS // EVERY)]
    lines = [Line(name, steps, bits(*sizes)) for name, sizes in ARMS.items()]
    return draw(
        "Drawn shapes of 8 x 8 pixels: bits per dimension by number of blocks", lines, x="step",
        y="bits per dimension, held out",
    )  # fmt: skip
