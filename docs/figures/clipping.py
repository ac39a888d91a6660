"""Post 10657: norms of the gradient over a training, for networks of several sizes."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.plot import Line, draw
from torch import nn
from torch.nn import functional as F

from quintic import clip_grad_norm_
from quintic.assets import corpus_path

WIDTHS = (32, 128, 512)
CONTEXT, BATCH, STEPS, WINDOW = 8, 512, 400, 10


def norms(width: int) -> tuple[list[float], int]:
    """Norm before clipping of every step, and the number of parameters."""
    text = np.frombuffer(corpus_path().read_bytes(), dtype=np.uint8)
    ids = torch.from_numpy(np.unique(text, return_inverse=True)[1])
    letters = int(ids.max()) + 1
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(letters, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, width), nn.ReLU(), nn.Linear(width, width),
        nn.ReLU(), nn.Linear(width, letters),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    found = []
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=generator)
        windows = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        F.cross_entropy(model(windows[:, :-1]), windows[:, -1]).backward()
        found.append(float(clip_grad_norm_(model, float("inf"))))  # infinity only measures
        optimizer.step()
    return found, sum(p.numel() for p in model.parameters())


def figure() -> str:
    """Medians of ten steps."""
    lines = []
    for width in WIDTHS:
        found, size = norms(width)
        medians = np.median(np.reshape(found, (-1, WINDOW)), axis=1)
        steps = [WINDOW * (i + 0.5) for i in range(len(medians))]
        lines.append(Line(f"{size:,} parameters", steps, medians.tolist()))
    return draw(
        "Norm of the gradient over a training, not clipped", lines, x="step",
        y="global norm, median of ten steps", log_y=True, marks=False, rules={"threshold 1": 1.0},
    )  # fmt: skip
