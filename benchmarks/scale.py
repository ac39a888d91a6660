"""How large should Muon's update be, and how should it depend on a matrix's shape?

Moonlight's Table 8 (arXiv 2502.16982): with everything else at AdamW's own rate, the RMS of Muon's update is swept.
Its Table 1 and post 11416: one factor for all shapes against factors of the shape, each with its rate swept. And
Moonlight's Figure 4: how many matrices end with a higher SVD entropy under Muon than under AdamW, both at their best
rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims import Claim, holds, table
from benchmarks.muon_race import entropy_share
from benchmarks.plot import Line, draw, image
from benchmarks.study import SEEDS, Book, Run, arm_run, paired, plus_minus, race, spread
from quintic.optim.lr import SCALES, UPDATE_RMS, scale_factor

BASE = Run(steps=400)
START = {"adamw": (0.008, 0.016), "muon": (0.016, 0.032)}
ADAMW = {"optim": {"name": "adamw"}}
MUON = {"optim": {"name": "muon"}}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def run(
    book: Book | None = None,
    base: Run = BASE,
    start: Mapping[str, Sequence[float]] = START,
    seeds: Sequence[int] = SEEDS,
) -> dict:
    book = book or Book("scale")
    adamw = race(book, base, {"adamw": ADAMW}, start["adamw"], seeds).winner
    sweep = []
    for factor in FACTORS:
        losses = [book(arm_run(base, {**MUON, "matrix_lr": factor}, adamw.best_lr, seed)).loss for seed in seeds]
        sweep.append({"rms": UPDATE_RMS * factor, "losses": losses, "against_adamw": paired(losses, adamw.losses)})
    scales = race(book, base, {scale: scale_arm(scale, base.width) for scale in SCALES}, start["muon"], seeds)
    muon = scales.arms[0]
    shares = [
        entropy_share(book(arm_run(base, scale_arm(muon.name, base.width), muon.best_lr, seed)).entropies,
                      book(arm_run(base, ADAMW, adamw.best_lr, seed)).entropies)
        for seed in seeds
    ]  # fmt: skip
    return {
        "seeds": list(seeds), "steps": base.steps,
        "adamw": {"best_lr": adamw.best_lr, "losses": adamw.losses, **spread(adamw.losses)},
        "rms": sweep,
        "scales": [
            {**arm, "against_moonlight": paired(arm["losses"], muon.losses)} for arm in scales.to_json()["arms"]
        ],
        "entropy_higher": shares,
    }  # fmt: skip


def scale_arm(scale: str, width: int) -> dict[str, Any]:
    """A scale whose factor is moonlight's on a square matrix of the model's width, so that only shapes differ."""
    ratio = scale_factor("moonlight", width, width) / scale_factor(scale, width, width)
    return {"optim": {"name": "muon", "scale": scale}, "matrix_lr": ratio}


def section(result: dict) -> str:
    adamw = result["adamw"]
    n = len(result["seeds"])
    rows = [(f"{r['rms']:g}", plus_minus(spread(r["losses"])), plus_minus(r["against_adamw"])) for r in result["rms"]]
    scales = [
        (s["name"], f"{s['best_lr']:g} ({'yes' if s['interior'] else 'no'})", plus_minus(spread(s["losses"])),
         plus_minus(s["against_moonlight"]))
        for s in result["scales"]
    ]  # fmt: skip
    return "\n\n".join([
        "## The size of Muon's update",
        f"`python -m benchmarks scale`: small size, {result['steps']} steps, {n} seeds.",
        f"### RMS of the update, everything at AdamW's best rate {adamw['best_lr']:g}",
        f"AdamW itself: {plus_minus(spread(adamw['losses']))}.",
        table(("update RMS", "loss", "difference to AdamW"), rows),
        image("scale-rms", "Loss over the RMS of Muon's update"),
        "### The factor of a shape",
        "All are moonlight's on a square matrix, so that only the treatment of shapes differs; rates swept for each. "
        "This model\nhas square matrices and such of aspect 4, tall and wide.",
        table(("scale", "best rate (interior)", "loss", "difference to moonlight"), scales),
    ])  # fmt: skip


def plots(result: dict) -> dict[str, str]:
    found = [(r["rms"], spread(r["losses"])) for r in result["rms"]]
    lines = [Line("Muon", [x for x, _ in found], [s["mean"] for _, s in found], [s["half"] for _, s in found])]
    adamw = spread(result["adamw"]["losses"])["mean"]
    return {
        "scale-rms": draw(
            "Loss by the RMS of Muon's update, at AdamW's best rate", lines, x="update RMS", y="nats a character",
            log_x=True, rules={"AdamW": adamw},
        )
    }  # fmt: skip


def claims(result: dict) -> list[Claim]:
    n = len(result["seeds"])
    at = {round(r["rms"], 4): r for r in result["rms"]}
    best = min(result["rms"], key=lambda r: spread(r["losses"])["mean"])
    gap = paired(at[0.2]["losses"], best["losses"])
    found = [
        Claim(
            "An update RMS of 0.2 to 0.4 is best at AdamW's rate", "Moonlight, Table 8",
            f"best is {best['rms']:g}; 0.2 is {plus_minus(gap)} above it", n,
            "yes" if best["rms"] in (0.2, 0.4) else "no: larger is better here" if best["rms"] > 0.4 else "no", "scale",
        )
    ]  # fmt: skip
    scales = {s["name"]: s for s in result["scales"]}
    for name, words in (("none", "One factor for all shapes is worse than moonlight's"),
                        ("rms", "Measuring the update's RMS is no better than moonlight's factor")):  # fmt: skip
        difference = scales[name]["against_moonlight"]
        if name == "none":
            verdict = holds(-difference["mean"], difference["half"])
        else:
            verdict = "no" if difference["mean"] < -difference["half"] else "yes"
        found.append(
            Claim(words, "Moonlight, Table 1", f"{plus_minus(difference)} against moonlight", n, verdict, "scale")
        )
    return found
