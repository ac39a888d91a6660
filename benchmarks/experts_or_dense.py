"""Experts against a dense model of equal active compute: at equal steps, and at equal time on this machine.

The model, data and default balancer of :mod:`benchmarks.balance`. The time of a step of both is measured in turns, one
thread; the dense model then trains for as many more steps as its steps are quicker. On few cores and at this size
experts cost time that their arithmetic does not explain, so that equal compute and equal time are two questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.balance import SEEDS, Arm, Book, train
from benchmarks.claims import Claim, holds, table
from benchmarks.study import paired, plus_minus, spread
from quintic.core.machine import describe
from quintic.moe import LossFree
from quintic.moe.balance import RATES

BASE = Arm()
ROUNDS = 5
STEPS = 40
"""Of one measurement of the time."""


def run(
    book: Callable[[Arm], dict[str, Any]] | None = None,
    base: Arm = BASE,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
) -> dict[str, Any]:
    book = book or Book()
    rule = LossFree().rule
    arms = {"experts": replace(base, balance=rule, rate=RATES[rule]), "dense": replace(base, dense=True)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            times[name].append(train(replace(arm, steps=steps))["seconds"] / steps)
    seconds = {name: min(found) for name, found in times.items()}
    arms["dense, equal time"] = replace(arms["dense"], steps=round(base.steps * seconds["experts"] / seconds["dense"]))
    seconds["dense, equal time"] = seconds["dense"]
    tokens = base.batch * 64
    return {
        "machine": describe(torch.device("cpu"), torch.float32),
        "seeds": list(seeds),
        "arms": {
            name: {
                "steps": arm.steps,
                "tokens_per_second": tokens / seconds[name],
                "losses": [book(replace(arm, seed=seed))["loss"] for seed in seeds],
            }
            for name, arm in arms.items()
        },
    }


def section(result: dict[str, Any]) -> str:
    ours = result["arms"]["experts"]["losses"]
    rows = [
        (name, str(arm["steps"]), f"{arm['tokens_per_second']:,.0f}", plus_minus(spread(arm["losses"])),
         "" if arm["losses"] is ours else plus_minus(paired(ours, arm["losses"])))
        for name, arm in result["arms"].items()
    ]  # fmt: skip
    head = ("model", "steps", "tokens a second", "validation loss", "experts less this")
    return "\n\n".join([
        "## Experts or dense",
        "`python -m benchmarks experts_or_dense`: the small model of the study of balancing, 16 experts of which two "
        f"and a shared one work,\nbeside dense layers as wide as these three; {len(result['seeds'])} seeds, nats a "
        f"character, one thread. {result['machine']['cpu']}.",
        table(head, rows),
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    arms, made = result["arms"], []
    for other, words in (("dense", "equal active compute"), ("dense, equal time", "equal time on this machine")):
        gap = paired(arms["experts"]["losses"], arms[other]["losses"])
        made.append(Claim(
            f"Experts are better than a dense model at {words}", "post 10699", f"{plus_minus(gap)} nats",
            len(result["seeds"]), holds(gap["mean"], gap["half"]), "experts_or_dense",
        ))  # fmt: skip
    return made
