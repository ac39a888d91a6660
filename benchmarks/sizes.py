"""Does the best learning rate fall like one over the root of the parameters? Post 10657's argument, over three sizes.

Under Adam or sign descent the loss changes by -lr ||g||_1 = -lr sqrt(N) ||g|| cos(sign g, g) in a step. If ||g|| and
the cosine hardly depend on the size N, then the best rate is proportional to 1 / sqrt(N). All three are measured:
norm and cosine over the last fifth of a run at its best rate, the best rate as the vertex of a parabola through the
losses at the best of a grid of factor 2 and its two neighbours, for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.claims import Claim, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import SEEDS, Book, Run, arm_run, plus_minus, race, spread

SIZES = tuple(
    Run(layers=layers, width=width, heads=width // 32, batch=8, steps=250)
    for layers, width in ((2, 32), (2, 64), (3, 96))
)
START = (0.004, 0.008, 0.016)


def run(
    book: Book | None = None, sizes: Sequence[Run] = SIZES, start: Sequence[float] = START, seeds: Sequence[int] = SEEDS
) -> dict:
    book = book or Book("sizes")
    arms = {}
    for name in ("adamw", "muon"):
        found = [one(book, base, name, start, seeds) for base in sizes]
        x = np.log([size["parameters"] for size in found])
        slopes = [
            float(np.polyfit(x, np.log([size["best_lrs"][i] for size in found]), 1)[0]) for i in range(len(seeds))
        ]
        arms[name] = {"sizes": found, "slope": spread(slopes)}
    return {"seeds": list(seeds), "steps": sizes[0].steps, "arms": arms}


def one(book: Book, base: Run, name: str, start: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    arm = {"optim": {"name": name}}
    tuned = race(book, base, {name: arm}, start, seeds).winner
    lrs = [tuned.best_lr / 2, tuned.best_lr, tuned.best_lr * 2]
    grid = [[book(arm_run(base, arm, lr, seed)) for lr in lrs] for seed in seeds]
    at_best = [row[1] for row in grid]
    return {
        "layers": base.layers, "width": base.width, "parameters": at_best[0].parameters,
        "best_lr": tuned.best_lr, "interior": tuned.interior,
        "best_lrs": [vertex(lrs, [outcome.loss for outcome in row]) for row in grid],
        "losses": [outcome.loss for outcome in at_best],
        "grad_norm": spread([outcome.grad_norm for outcome in at_best]),
        "cosine": spread([outcome.cosine for outcome in at_best]),
        "sweep": tuned.sweep,
    }  # fmt: skip


def vertex(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Where the parabola in log(lr) through three evenly spaced points is lowest, within their range.

    Example:
        >>> vertex([1.0, 2.0, 4.0], [1.0, 0.0, 1.0]), vertex([1.0, 2.0, 4.0], [0.0, 1.0, 3.0])
        (2.0, 1.0)
    """
    a, b, c = losses
    bend = a - 2 * b + c
    if not math.isfinite(bend) or bend <= 0:
        return lrs[int(np.argmin(losses))]
    shift = min(1.0, max(-1.0, 0.5 * (a - c) / bend))
    return lrs[1] * (lrs[2] / lrs[1]) ** shift


def section(result: dict) -> str:
    parts = [
        "## Gradient norm, cosine and best rate over three sizes",
        f"`python -m benchmarks sizes`: {result['steps']} steps of batch 8, {len(result['seeds'])} seeds; depth and "
        "width grow together. Norm and cosine are\nof the last fifth of a run, before clipping.",
    ]
    for name, arm in result["arms"].items():
        rows = [
            (f"{s['parameters']:,}", f"{s['layers']} x {s['width']}",
             f"{s['best_lr']:g} ({'yes' if s['interior'] else 'no'})", f"{geometric(s['best_lrs']):.4f}",
             plus_minus(s["grad_norm"]), plus_minus(s["cosine"]), plus_minus(spread(s["losses"])))
            for s in arm["sizes"]
        ]  # fmt: skip
        head = (
            "parameters",
            "layers x width",
            "best of the grid (interior)",
            "vertex",
            "norm",
            "cos(sign g, g)",
            "loss",
        )
        parts += [
            f"### {name}", table(head, rows),
            f"Best rate ~ N to the power {plus_minus(arm['slope'], 2)}; the argument says -0.5.",
        ]  # fmt: skip
    images = [
        image("sizes-rates", "Best rate over parameters"),
        image("sizes-gradients", "Gradient norm over parameters"),
    ]
    return "\n\n".join([*parts, *images])


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def plots(result: dict) -> dict[str, str]:
    rates, norms = [], []
    for name, arm in result["arms"].items():
        x = [s["parameters"] for s in arm["sizes"]]
        rates.append(Line(name, x, [geometric(s["best_lrs"]) for s in arm["sizes"]]))
        for key, label in (("grad_norm", "norm"), ("cosine", "cosine")):
            found = [s[key] for s in arm["sizes"]]
            norms.append(Line(f"{name}, {label}", x, [f["mean"] for f in found], [f["half"] for f in found]))
    x, first = rates[0].x, rates[0].y[0]
    law = Line("one over the root of N", x, [first * math.sqrt(x[0] / n) for n in x])
    return {
        "sizes-rates": draw(
            "Best learning rate by size", [*rates, law], x="parameters", y="learning rate", log_x=True, log_y=True
        ),
        "sizes-gradients": draw(
            "Gradient norm and cosine by size, last fifth of a run", norms, x="parameters", y="norm, cos(sign g, g)",
            log_x=True, log_y=True,
        ),
    }  # fmt: skip


def claims(result: dict) -> list[Claim]:
    found = []
    n = len(result["seeds"])
    for name, arm in result["arms"].items():
        for key, words in (("grad_norm", "The gradient norm"), ("cosine", "cos(sign g, g)")):
            means = [s[key]["mean"] for s in arm["sizes"]]
            few, many = (arm["sizes"][i]["parameters"] for i in (0, -1))
            spans = f"{min(means):.3f} to {max(means):.3f} over {few:,} to {many:,} parameters"
            ratio = max(means) / min(means)
            found.append(Claim(
                f"{words} hardly depends on the model's size; {name}", "post 10657", spans, n,
                "yes" if ratio < 1.5 else f"no: a factor of {ratio:.1f}", "sizes",
            ))  # fmt: skip
        slope = arm["slope"]
        found.append(Claim(
            f"The best rate is proportional to N^(-1/2); {name}", "post 10657",
            f"N to the power {plus_minus(slope, 2)}", n,
            "yes" if abs(slope["mean"] + 0.5) <= slope["half"] else "no", "sizes",
        ))  # fmt: skip
    return found
