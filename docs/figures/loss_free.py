"""Post 10757: MaxVio of a simulated router under each rule for the bias."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.plot import Line, draw

from quintic import LossFree
from quintic.moe import max_violation, sampling_floor
from quintic.moe.router import argtop

EXPERTS, CHOSEN, TOKENS, STEPS, WINDOW = 32, 4, 2048, 300, 5
ARMS = {
    "floored-rms": LossFree(),
    "sign, 0.001": LossFree("sign", rate=0.001),
    "sign, 0.01": LossFree("sign", rate=0.01),
    "rms, 0.001": LossFree("rms", rate=0.001),
    "rms, 0.01": LossFree("rms", rate=0.01),
}


def violations(balance: LossFree, steps: int = STEPS) -> list[float]:
    """MaxVio of every step: fresh normal logits, and an offset of each expert that the bias has to undo."""
    generator = torch.Generator().manual_seed(0)
    offset = 0.5 * torch.randn(EXPERTS, generator=generator)
    bias = torch.zeros(EXPERTS)
    found = []
    for _ in range(steps):
        scores = torch.sigmoid(torch.randn(TOKENS, EXPERTS, generator=generator) + offset)
        counts = torch.bincount(argtop(scores + bias, CHOSEN).flatten(), minlength=EXPERTS)
        found.append(max_violation(counts))
        balance.step(bias, counts, CHOSEN)  # after the batch that used the bias
    return found


def figure() -> str:
    """Means of five steps."""
    steps = [WINDOW * (i + 0.5) for i in range(STEPS // WINDOW)]
    lines = [
        Line(name, steps, np.mean(np.reshape(violations(balance), (-1, WINDOW)), axis=1).tolist())
        for name, balance in ARMS.items()
    ]
    return draw(
        "MaxVio of a simulated router by the rule that moves its bias", lines, x="step",
        y="MaxVio, mean of five steps", log_y=True, marks=False,
        rules={"chance alone": sampling_floor(TOKENS, EXPERTS, CHOSEN)},
    )  # fmt: skip
