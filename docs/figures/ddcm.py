"""Post 10711: how far the chosen noise goes where it is wanted, by the size of the codebook and the rule."""

from __future__ import annotations

import numpy as np
from benchmarks.plot import Line, draw

from quintic.codec.codebook import GaussianCodebook
from quintic.codec.selection import Single
from quintic.core.counter_rng import Stream

DIMENSION, LENGTH, TRIALS, SHARED = 8, 1.5, 200, 10
SIZES = (2, 4, 16, 64, 256, 1024, 4096, 16384)
RULES = {"argmax": "argmax", "softmax": "softmax", "softmax of the distance": "literal"}


def carried(size: int, draw_rule: str) -> tuple[float, float]:
    """Mean over codebooks of <z, a> / |a|^2, and half of its 95 % interval; 1 is the posterior's."""
    found = []
    for trial in range(TRIALS):
        directions = Stream(0, "figure", trial).normal(0, SHARED * DIMENSION).reshape(SHARED, DIMENSION)
        wanted = LENGTH * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        book = GaussianCodebook(DIMENSION, size, seed=trial, step=0)
        rule = Single(draw_rule)
        noise = rule.noise(rule.choose(wanted, book, Stream(1, "figure", trial)), book)
        found.append(float(np.mean((noise * wanted).sum(1)) / LENGTH**2))
    return float(np.mean(found)), float(1.96 * np.std(found) / TRIALS**0.5)


def figure() -> str:
    """Carried share over the size of the codebook."""
    lines = []
    for name, draw_rule in RULES.items():
        values = [carried(size, draw_rule) for size in SIZES]
        lines.append(Line(name, [float(s) for s in SIZES], [m for m, _ in values], [h for _, h in values]))
    return draw(
        "How much of the wanted shift a codebook's noise carries, in 8 dimensions", lines, x="atoms K in a codebook",
        y="shift carried / shift wanted", log_x=True, rules={"the true reverse step": 1.0},
    )  # fmt: skip
