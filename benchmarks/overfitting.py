"""Post 10648's spectral weight decay over a long run that learns a small text by heart.

Arms: no decay, Frobenius decay (of all singular values), spectral decay as here (of the largest, its vector followed
from step to step), of the four largest, and in the post's own form (the vector anew in every step: ten iterations
from all ones). Embeddings and gains have Frobenius decay in all of these, and in one arm they alone. What is asked:
validation loss at the end and at its best, and log sigma_1 of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.claims import Claim, holds, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import SEEDS, Book, Run, paired, plus_minus, spread

BASE = Run(steps=1000, batch=8, characters=16_000, track=100, held_out=16_384, optim={"name": "muon", "lr": 0.008})
STRENGTH = 0.5
"""Five times the usual, so that a short run shows it."""
ARMS: dict[str, dict[str, Any]] = {
    "none at all": {"optim": {"weight_decay": 0.0}},
    "none of matrices": {"matrix_decay": "none"},
    "frobenius": {},
    "spectral": {"optim": {"decay": "spectral"}},
    "spectral, rank 4": {"optim": {"decay": "spectral", "decay_rank": 4}},
    "spectral, post's form": {"matrix_decay": "post"},
}


def run(book: Book | None = None, base: Run = BASE, strength: float = STRENGTH, seeds: Sequence[int] = SEEDS) -> dict:
    book = book or Book("overfitting")
    arms = []
    for name, arm in ARMS.items():
        optim = {**base.optim, "weight_decay": strength, **arm.get("optim", {})}
        found = [book(replace(base, **{**arm, "optim": optim, "seed": seed})) for seed in seeds]
        arms.append({
            "name": name,
            "losses": [each.loss for each in found],
            "best": [min(each.curve["validation"]) for each in found],
            "train": [each.curve["train"][-1] for each in found],
            "log_sigma": [each.curve["log_sigma"][-1] for each in found],
            "entropy": [each.curve["entropy"][-1] for each in found],
            "curve": found[0].curve,
        })  # fmt: skip
    return {
        "seeds": list(seeds), "steps": base.steps, "characters": base.characters, "lr": base.optim["lr"],
        "passes": base.steps * base.batch * base.context / base.characters, "strength": strength, "arms": arms,
    }  # fmt: skip


def section(result: dict) -> str:
    frobenius = next(arm for arm in result["arms"] if arm["name"] == "frobenius")
    rows = [
        (arm["name"], plus_minus(spread(arm["best"])), plus_minus(paired(arm["best"], frobenius["best"])),
         plus_minus(spread(arm["losses"])), plus_minus(spread(arm["train"])), plus_minus(spread(arm["log_sigma"]), 2),
         plus_minus(spread(arm["entropy"]), 2))
        for arm in result["arms"]
    ]  # fmt: skip
    head = ("decay", "lowest validation loss", "difference to frobenius", "validation loss at the end",
            "training loss at the end", "mean log sigma_1", "SVD entropy")  # fmt: skip
    return "\n\n".join([
        "## Weight decay, Frobenius and spectral, over a run that learns by heart",
        f"`python -m benchmarks overfitting`: {result['passes']:.0f} passes over {result['characters']:,} characters, "
        f"{result['steps']} steps under Muon, rate {result['lr']:g} and lambda {result['strength']:g},\nthe same "
        f"for all arms, {len(result['seeds'])} seeds. The lowest loss is over validations, one every hundred "
        "steps.",
        table(head, rows),
        image("overfitting-validation", "Validation loss over the run"),
        image("overfitting-sigma", "Largest singular value over the run"),
    ])  # fmt: skip


def plots(result: dict) -> dict[str, str]:
    def lines(key: str) -> list[Line]:  # without the first step, which would flatten the rest
        return [Line(arm["name"], arm["curve"]["step"][1:], arm["curve"][key][1:]) for arm in result["arms"]]

    titles = {
        "validation": ("Validation loss of a run that learns by heart, first seed", "nats a character"),
        "log_sigma": ("Mean log of the largest singular value of the matrices, first seed", "log sigma_1"),
    }
    return {
        f"overfitting-{key.removeprefix('log_')}": draw(title, lines(key), x="step", y=y, marks=False)
        for key, (title, y) in titles.items()
    }


def claims(result: dict) -> list[Claim]:
    n = len(result["seeds"])
    arms = {arm["name"]: arm for arm in result["arms"]}
    frobenius, none = arms["frobenius"], arms["none of matrices"]
    post, own = arms["spectral, post's form"], arms["spectral"]
    lowest, sigma = paired(post["best"], frobenius["best"]), paired(own["log_sigma"], none["log_sigma"])
    same = paired(own["best"], post["best"])
    verdict = {"yes": "yes: better", "no": "no"}.get(
        holds(lowest["mean"], lowest["half"]), "yes: no worse beyond the noise"
    )
    return [
        Claim(
            "Spectral decay is perhaps slightly better than Frobenius decay, at least no worse", "post 10648",
            f"lowest validation loss {plus_minus(lowest)} against Frobenius", n, verdict, "overfitting",
        ),
        Claim(
            "Spectral decay keeps the largest singular values down", "post 10648",
            f"mean log sigma_1 {plus_minus(sigma)} against none of matrices; "
            f"Frobenius {plus_minus(paired(frobenius['log_sigma'], none['log_sigma']))}", n,
            holds(sigma["mean"], sigma["half"]), "overfitting",
        ),
        Claim(
            "One iteration a step on a vector that is kept does what ten from all ones do", "ours",
            f"lowest validation loss {plus_minus(same)}, mean log sigma_1 "
            f"{plus_minus(paired(own['log_sigma'], post['log_sigma']))}", n,
            "yes" if abs(same["mean"]) <= max(0.01, same["half"]) else "no", "overfitting",
        ),
    ]  # fmt: skip
