"""Must a model that was trained by one optimizer be tuned by the same one? Moonlight's Table 6, small.

Two optimizers before times two after: trained on Moby Dick, then tuned on a megabyte of Python's own library, every
one of the four with its own swept rate, three seeds. And how much of Moby Dick is forgotten is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.claims import Claim, holds, table
from benchmarks.study import SEEDS, Book, Run, arm_run, paired, plus_minus, race, spread

BEFORE = Run(steps=400)
AFTER = Run(steps=200, text="python")
RATES = {"adamw": 0.008, "muon": 0.016}
"""The best of the studies of this size."""
START = (0.002, 0.004, 0.008)


def run(
    book: Book | None = None,
    before: Run = BEFORE,
    after: Run = AFTER,
    start: Sequence[float] = START,
    seeds: Sequence[int] = SEEDS,
) -> dict:
    book = book or Book("finetuning")
    cells = []
    for first, rate in RATES.items():
        for second in RATES:
            # The seed of the tuning is that of the training before it.
            tuned = race(
                SeededStart(book, arm_run(before, {"optim": {"name": first}}, rate, 0)),
                after, {second: {"optim": {"name": second}}}, start, seeds,
            ).winner  # fmt: skip
            cells.append({
                "before": first, "after": second, "best_lr": tuned.best_lr, "interior": tuned.interior,
                "losses": tuned.losses, "mean": tuned.mean, "spread": tuned.spread, "sweep": tuned.sweep,
            })  # fmt: skip
    for cell in cells:
        cell["against_adamw_adamw"] = paired(cell["losses"], cells[0]["losses"])
    return {"seeds": list(seeds), "steps": [before.steps, after.steps], "rates": RATES, "cells": cells}


class SeededStart:
    """A book whose runs begin where a run of their own seed ended."""

    def __init__(self, book: Book, before: Run) -> None:
        self.book, self.before, self.note = book, before, book.note

    def __call__(self, run: Run):
        return self.book(replace(run, start=replace(self.before, seed=run.seed)))


def section(result: dict) -> str:
    rows = [
        (c["before"], c["after"], f"{c['best_lr']:g} ({'yes' if c['interior'] else 'no'})",
         plus_minus(spread(c["losses"])), plus_minus(c["against_adamw_adamw"]))
        for c in result["cells"]
    ]  # fmt: skip
    head = ("trained by", "tuned by", "best rate (interior)", "loss", "difference to AdamW twice")
    return "\n\n".join([
        "## Training by one optimizer, tuning by another",
        f"`python -m benchmarks finetuning`: small size, {result['steps'][0]} steps on Moby Dick, then "
        f"{result['steps'][1]} on a megabyte of Python's own library\n(of the Python that runs the benchmark), rates "
        f"of the tuning swept for every cell, {len(result['seeds'])} seeds.",
        table(head, rows),
    ])  # fmt: skip


def claims(result: dict) -> list[Claim]:
    cell = {(c["before"], c["after"]): c["losses"] for c in result["cells"]}
    n = len(result["seeds"])
    both = paired(cell["muon", "muon"], cell["adamw", "adamw"])
    mixed = paired(cell["adamw", "muon"], cell["adamw", "adamw"])
    other = paired(cell["muon", "adamw"], cell["adamw", "adamw"])
    after = paired(cell["muon", "muon"], cell["muon", "adamw"])
    gone = min(abs(found["mean"]) - found["half"] for found in (mixed, other)) <= 0
    return [
        Claim("Muon before and after beats AdamW before and after", "Moonlight, Table 6", plus_minus(both), n,
              holds(both["mean"], both["half"]), "finetuning"),
        Claim("What AdamW trained is tuned slightly worse by Muon than by AdamW", "Moonlight, Table 7",
              plus_minus(mixed), n, holds(-mixed["mean"], mixed["half"]), "finetuning"),
        Claim("What Muon trained is tuned better by Muon than by AdamW", "Moonlight, Table 6", plus_minus(after), n,
              holds(after["mean"], after["half"]), "finetuning"),
        Claim("Where the two differ nothing is left of the advantage over AdamW twice", "post 10739",
              f"Muon, then AdamW {plus_minus(other)}; AdamW, then Muon {plus_minus(mixed)}", n,
              "yes" if gone else "no", "finetuning"),
    ]  # fmt: skip
