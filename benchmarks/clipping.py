"""Post 10657: is 1 a good clipping threshold, what does warm-up do, and can a cap on the step replace it?

The post's argument: the loss changes by about -lr u.g in a step, which in late training is less than lr; so gradient
norms are below 1 then whatever the model's size, and only the start is worse. Warm-up shields the start; so does a
cap on the step, or clipping. A cap T has a price: the loss cannot fall by more than T times the sum of the rates.
Small size, both optimizers, every arm at the rate that is best with threshold 1 and a warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.claims import Claim, holds, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import BASE as BASE_OPTIM
from benchmarks.study import SEEDS, Book, Run, arm_run, paired, plus_minus, race, spread
from quintic.optim import OptimConfig, lr_factor

BASE = Run(steps=400)
START = (0.004, 0.008, 0.016)
OPTIMIZERS = ("adamw", "muon")
THRESHOLDS = (0.03, 0.1, 0.3, 1.0, 3.0, float("inf"))


def run(
    book: Book | None = None, base: Run = BASE, start: Sequence[float] = START, seeds: Sequence[int] = SEEDS
) -> dict:
    book = book or Book("clipping")
    return {
        "seeds": list(seeds),
        "steps": base.steps,
        "arms": {name: one(book, base, name, start, seeds) for name in OPTIMIZERS},
    }


def one(book: Book, base: Run, name: str, start: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    tuned = race(book, base, {name: {"optim": {"name": name}}}, start, seeds).winner

    def losses(lr: float, **optim: Any) -> list[float]:
        return [book(arm_run(base, {"optim": {"name": name, **optim}}, lr, seed)).loss for seed in seeds]

    thresholds = []
    for threshold in THRESHOLDS:
        found = losses(tuned.best_lr, clip_norm=threshold)
        clipped = [
            book(arm_run(base, {"optim": {"name": name, "clip_norm": threshold}}, tuned.best_lr, seed)).clipped
            for seed in seeds
        ]
        thresholds.append({
            "threshold": None if threshold == float("inf") else threshold,
            "losses": found,
            "against_1": paired(found, tuned.losses),
            "clipped": spread(clipped)["mean"],
        })  # fmt: skip
    starts = []
    for factor in (1.0, 2.0):
        lr = factor * tuned.best_lr
        reference = losses(lr)
        for label, optim in ways_to_start().items():
            found = losses(lr, **optim)
            starts.append({"start": label, "lr": lr, "losses": found, "against_warm_up": paired(found, reference)})
    return {"best_lr": tuned.best_lr, "interior": tuned.interior, "thresholds": thresholds, "starts": starts}


def ways_to_start() -> dict[str, dict[str, Any]]:
    """{name: settings}: warm-up and clipping, each and neither, and the post's cap on the step in place of both."""
    return {
        "warm-up": {},
        "none": {"warmup_fraction": 0.0},
        "warm-up, not clipped": {"clip": "none"},
        "none, not clipped": {"warmup_fraction": 0.0, "clip": "none"},
        "none, not clipped, cap 1": {"warmup_fraction": 0.0, "clip": "none", "cap": 1.0},
        "none, not clipped, cap 10": {"warmup_fraction": 0.0, "clip": "none", "cap": 10.0},
    }


def section(result: dict) -> str:
    parts = [
        "## Clipping and warm-up",
        f"`python -m benchmarks clipping`: small size, {result['steps']} steps, {len(result['seeds'])} seeds. Every "
        "optimizer at the rate that is best with\nthreshold 1 and a warm-up over a tenth of the steps; starts also at "
        "twice that rate.",
    ]
    for name, arm in result["arms"].items():
        rows = [
            ("none" if t["threshold"] is None else f"{t['threshold']:g}", f"{t['clipped']:.0%}",
             plus_minus(spread(t["losses"])), plus_minus(t["against_1"]))
            for t in arm["thresholds"]
        ]  # fmt: skip
        parts += [
            f"### {name}, rate {arm['best_lr']:g}",
            table(("threshold", "steps clipped", "loss", "difference to threshold 1"), rows),
            table(
                ("start", "rate", "loss", "difference to warm-up and clipping at 1"),
                [(s["start"], f"{s['lr']:g}", plus_minus(spread(s["losses"])), plus_minus(s["against_warm_up"]))
                 for s in arm["starts"]],
            ),
        ]  # fmt: skip
    parts.append(image("clipping-thresholds", "Loss over the clipping threshold"))
    low = min(arm["best_lr"] for arm in result["arms"].values())
    parts.append(
        "To first order a cap T lets the loss fall by no more than T times the sum of the rates: at rate "
        f"{low:g}\nwithout warm-up by {low * sum_of_factors(result['steps']):.1f} T nats over the whole run."
    )
    if missing := ways_to_start().keys() - {s["start"] for arm in result["arms"].values() for s in arm["starts"]}:
        parts.append(f"Not run yet: {'; '.join(sorted(missing))}.")
    return "\n\n".join(parts)


def sum_of_factors(steps: int) -> float:
    """Of the schedule without warm-up: what the rates add up to, in units of the peak."""
    config = OptimConfig(**{**BASE_OPTIM, "warmup_fraction": 0.0})
    return sum(lr_factor(step, steps, config) for step in range(steps))


def plots(result: dict) -> dict[str, str]:
    lines, rules = [], {}
    for name, arm in result["arms"].items():
        known = [(t["threshold"], spread(t["losses"])) for t in arm["thresholds"] if t["threshold"] is not None]
        lines.append(Line(name, [t for t, _ in known], [s["mean"] for _, s in known], [s["half"] for _, s in known]))
        rules[f"{name}, not clipped"] = spread(arm["thresholds"][-1]["losses"])["mean"]
    title = "Loss by clipping threshold, with 95 % intervals"
    return {"clipping-thresholds": draw(title, lines, x="threshold", y="nats a character", log_x=True, rules=rules)}


def claims(result: dict) -> list[Claim]:
    found = []
    n = len(result["seeds"])
    for name, arm in result["arms"].items():
        best = min(arm["thresholds"], key=lambda t: spread(t["losses"])["mean"])
        worse = -best["against_1"]["mean"]
        label = "no clipping" if best["threshold"] is None else f"threshold {best['threshold']:g}"
        found.append(Claim(
            f"1 is a good clipping threshold; {name}", "post 10657",
            f"best is {label}, {worse:.3f} ± {best['against_1']['half']:.3f} below threshold 1", n,
            "yes: none is better beyond the noise" if worse <= max(0.01, best["against_1"]["half"]) else "no",
            "clipping",
        ))  # fmt: skip
        for lr in sorted({s["lr"] for s in arm["starts"]}):
            here = {s["start"]: s for s in arm["starts"] if s["lr"] == lr}
            bare = here["none, not clipped"]
            without = bare["against_warm_up"]
            found.append(Claim(
                f"Without warm-up and clipping training is worse; {name}, rate {lr:g}", "post 10657",
                f"{plus_minus(without)} against both", n, holds(-without["mean"], without["half"]), "clipping",
            ))  # fmt: skip
            caps = [s for label, s in here.items() if "cap" in label]
            if not caps:
                continue
            cap = min(caps, key=lambda s: spread(s["losses"])["mean"])
            against = cap["against_warm_up"]
            found.append(Claim(
                f"A cap on the step replaces warm-up and clipping; {name}, rate {lr:g}", "post 10657",
                f"better of two, {cap['start'].split(', ')[-1]}: "
                f"{plus_minus(paired(cap['losses'], bare['losses']))} against neither, "
                f"{plus_minus(against)} against both", n,
                "yes" if against["mean"] <= 0.01 else holds(against["mean"], against["half"]),
                "clipping",
            ))  # fmt: skip
    return found
