"""Post 10735: MaxVio of a layer that learns, for several weights of the auxiliary loss."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.plot import Line, draw
from torch.nn import functional as F

from quintic import AuxLoss, MoE, aux_loss, balance_step
from quintic.moe import sampling_floor

WIDTH, EXPERTS, CHOSEN, TOKENS, STEPS, WINDOW = 32, 16, 2, 512, 300, 10
SHARES = (0.4, 0.2, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02)
WEIGHTS = (0.0, 0.01, 0.1, 1.0)


def learn(weight: float, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """MaxVio and the loss itself of every step. Eight kinds of inputs, some of them rare, each with its own map."""
    torch.manual_seed(0)
    layer = MoE(WIDTH, 16, EXPERTS, CHOSEN, num_shared=0, balance=AuxLoss(weight))
    maps = torch.randn(len(SHARES), WIDTH, WIDTH) * WIDTH**-0.5
    centres = torch.randn(len(SHARES), WIDTH)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    violations, losses = [], []
    for _ in range(steps):
        kind = torch.multinomial(torch.tensor(SHARES), TOKENS, replacement=True)
        x = centres[kind] + 0.7 * torch.randn(TOKENS, WIDTH)
        y = torch.tanh(torch.einsum("td,tde->te", x, maps[kind]))
        loss = F.mse_loss(layer(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + aux_loss(layer)).backward()
        optimizer.step()
        violations.append(balance_step(layer)[0].max_violation)
    return violations, losses


def figure() -> str:
    """Means of ten steps."""
    steps = [WINDOW * (i + 0.5) for i in range(STEPS // WINDOW)]
    lines = []
    for weight in WEIGHTS:
        violations, losses = learn(weight)
        name = f"weight {weight:g} (loss {np.mean(losses[-WINDOW:]):.3f})"
        lines.append(Line(name, steps, np.mean(np.reshape(violations, (-1, WINDOW)), axis=1).tolist()))
    return draw(
        "MaxVio of a layer with an auxiliary loss", lines, x="step", y="MaxVio, mean of ten steps", marks=False,
        rules={"chance alone": sampling_floor(TOKENS, EXPERTS, CHOSEN)},
    )  # fmt: skip
