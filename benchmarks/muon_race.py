"""Muon against AdamW on a plain character-level GPT, at two sizes; the larger one is nanoGPT's recipe for a CPU.

Both sides are tuned: learning rates swept by factors of 2 until the best is interior, AdamW for several values of its
second beta. Three seeds at the best, validation loss at the end of the schedule. How many steps Muon needs for
AdamW's loss is measured with shorter schedules of its own, seed by seed, not read off a curve. Equal time, with
AdamW's batch and model tuned too, is :mod:`benchmarks.equal_time`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.claims import Claim, holds, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import SEEDS, Book, Run, arm_run, paired, plus_minus, race, spread, step_seconds
from quintic.linalg.polar import choose_method

SIZES = {
    "small": (Run(steps=600), (0.95, 0.99, 0.999)),
    "nanoGPT": (Run(layers=4, width=128, heads=4, batch=12, steps=1000), (0.95, 0.99)),
}
"""What is trained, and values of AdamW's second beta."""
START = (0.008, 0.016)
MUON = {"optim": {"name": "muon"}}
RECIPE = {
    "optim": {
        "name": "adamw", "adamw_beta2": 0.99, "schedule": "cosine", "warmup_fraction": 0.05, "final_lr_fraction": 0.1,
    }
}  # fmt: skip
"""nanoGPT's: lr 1e-3, beta2 0.99, cosine to a tenth after 100 of 2000 steps."""


def run(
    book: Book | None = None,
    sizes: Mapping[str, tuple[Run, Sequence[float]]] = SIZES,
    start: Sequence[float] = START,
    seeds: Sequence[int] = SEEDS,
    rounds: int = 30,
) -> dict:
    from quintic.core.machine import describe, pick_device, pick_dtype

    book = book or Book("muon_race")
    device = pick_device("cpu")
    return {
        "machine": describe(device, pick_dtype("float32", device)),
        "seeds": list(seeds),
        "sizes": {name: one_size(book, *size, start, seeds, rounds) for name, size in sizes.items()},
    }


def one_size(
    book: Book, base: Run, betas: Sequence[float], start: Sequence[float], seeds: Sequence[int], rounds: int
) -> dict[str, Any]:
    arms = adamw_arms(betas)
    tuned = race(book, base, arms, start, seeds)
    best = tuned.winner
    adamw = arms[best.name]
    both = race(book, base, {"muon": MUON, best.name: adamw}, start, seeds, match=True)
    muon = both.arms[0]
    at_adamws = [book(arm_run(base, MUON, best.best_lr, seed)).loss for seed in seeds]
    recipe = [book(arm_run(base, RECIPE, 1e-3, seed)).loss for seed in seeds]
    runs = {"muon": arm_run(base, MUON, muon.best_lr, seeds[0]), "adamw": arm_run(base, adamw, best.best_lr, seeds[0])}
    parameters = book(runs["muon"]).parameters
    (match,) = both.matches
    return {
        "layers": base.layers, "width": base.width, "context": base.context, "batch": base.batch, "steps": base.steps,
        "parameters": parameters,
        "adamw": tuned.to_json()["arms"],
        "best_adamw": best.name,
        "muon": both.to_json()["arms"][0],
        "difference": paired(muon.losses, best.losses),
        "at_adamws_lr": at_adamws,
        "at_adamws_lr_difference": paired(at_adamws, best.losses),
        "recipe": recipe,
        "recipe_difference": paired(muon.losses, recipe),
        "winner": both.winner.name,
        "step_ratio": match["step_ratio"],
        "step_ratios": match["step_ratios"],
        "by_fraction": match["losses"],
        "step_seconds": step_seconds(runs, rounds),
        "step_flops": {"training": training_flops(base, parameters), "muon": muon_flops(base)},
        "entropy_higher": [
            entropy_share(book(arm_run(base, MUON, muon.best_lr, seed)).entropies,
                          book(arm_run(base, adamw, best.best_lr, seed)).entropies)
            for seed in seeds
        ],
    }  # fmt: skip


def adamw_arms(betas: Sequence[float]) -> dict[str, dict[str, Any]]:
    """AdamW with each of these second betas."""
    return {f"adamw, beta2 {beta}": {"optim": {"name": "adamw", "adamw_beta2": beta}} for beta in betas}


def training_flops(base: Run, parameters: int) -> float:
    """Of one step: 6 a parameter and character, and the attention products, half of which are masked away."""
    attention = 6.0 * base.layers * base.context * base.width
    return base.batch * base.context * (6.0 * parameters + attention)


def muon_flops(base: Run) -> float:
    """Of Newton-Schulz in one step: five iterations, in the form that is used for a shape."""
    total = 0.0
    for count, n, m in ((4, base.width, base.width), (2, base.width, 4 * base.width)):
        gram = choose_method(n, m, torch.float32) == "gram"
        each = 2 * (2 * n * n * m) * 2 + 28 * n**3 if gram else 5 * (4 * n * n * m + 2 * n**3)
        total += base.layers * count * each
    return total


def entropy_share(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """Share of the matrices whose SVD entropy is higher in a."""
    pairs = [(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)]
    return sum(x > y for x, y in pairs) / len(pairs)


def section(result: dict) -> str:
    parts = [
        "## Muon against AdamW on a plain GPT",
        "`python -m benchmarks muon_race`: characters of Moby Dick, rates swept by factors of 2 until the best is "
        "interior,\nAdamW's second beta too, "
        f"{len(result['seeds'])} seeds, nats a character at the end of the schedule on text kept out.\n"
        "The first seed tunes: a wide interval means that its best rate was at the edge of stability for others.\n"
        "The larger size is nanoGPT's recipe for a CPU (batch 12, context 64), where 768 characters a step make\n"
        "Newton-Schulz expensive: a step's cost does not depend on the batch. Step times are medians of steps in turns "
        f"on {result['machine']['cpu']}, one thread.",
    ]
    for name, r in result["sizes"].items():
        arms = [r["muon"], *r["adamw"]]
        rows = [
            (arm["name"], f"{arm['best_lr']:g}", "yes" if arm["interior"] else "no", plus_minus(spread(arm["losses"])))
            for arm in arms
        ]
        rows.append(
            ("muon at AdamW's best rate", f"{best_of(r)['best_lr']:g}", "", plus_minus(spread(r["at_adamws_lr"])))
        )
        rows.append(("nanoGPT's recipe, untouched", "0.001", "", plus_minus(spread(r["recipe"]))))
        parts += [
            f"### Size {name}: {r['layers']} layers, width {r['width']}, {r['parameters']:,} parameters, "
            f"{r['steps']} steps",
            table(("arm", "best rate", "interior", "loss"), rows),
            f"Muon minus the best AdamW: {plus_minus(r['difference'])}. {ratios(r)}. {costs(r)}",
            image(plot_name("rates", name), f"Loss over learning rate, size {name}"),
            image(plot_name("steps", name), f"Loss over the length of the schedule, size {name}"),
        ]
    return "\n\n".join(parts)


def best_of(r: dict) -> dict:
    """The best AdamW of a size."""
    return next(arm for arm in r["adamw"] if arm["name"] == r["best_adamw"])


def ratios(r: dict) -> str:
    """Steps, FLOPs and time to the loser's loss, in words; each with the interval over seeds."""
    if r["winner"] != "muon":
        return f"{r['winner']} wins, and needs {share_words(r, 1.0)} of the steps for Muon's loss"
    times, flops = r["step_seconds"], r["step_flops"]
    return (
        f"Muon reaches AdamW's loss in {share_words(r, 1.0)} of the steps, "
        f"{share_words(r, 1 + flops['muon'] / flops['training'])} of the FLOPs and "
        f"{share_words(r, times['muon'] / times['adamw'])} of the time"
    )


def share_words(r: dict, factor: float) -> str:
    """The share of the steps times a factor, over seeds; of the mean losses if a seed alone does not get there."""
    share = spread([factor * ratio for ratio in r["step_ratios"]])
    if math.isnan(share["mean"]):
        return f"{factor * r['step_ratio']:.2f} (not with every seed)"
    return plus_minus(share, 2)


def costs(r: dict) -> str:
    """What a step of either takes, in words."""
    times, flops = r["step_seconds"], r["step_flops"]
    return (
        f"A step of Muon takes {1000 * times['muon']:.1f} ms and {1 + flops['muon'] / flops['training']:.2f} times the "
        f"FLOPs, one of AdamW {1000 * times['adamw']:.1f} ms."
    )


def plot_name(what: str, size: str) -> str:
    return f"muon-race-{what}-{size.lower()}"


def plots(result: dict) -> dict[str, str]:
    found = {}
    for name, r in result["sizes"].items():
        sweeps = [("muon", r["muon"]["sweep"]), *((arm["name"], arm["sweep"]) for arm in r["adamw"])]
        lines = []
        for arm, sweep in sweeps:
            points = sorted((float(lr), loss) for lr, loss in sweep.items())
            lines.append(Line(arm, [lr for lr, _ in points], [loss for _, loss in points]))
        found[plot_name("rates", name)] = draw(
            f"Loss by learning rate, first seed, {r['parameters']:,} parameters", lines,
            x="learning rate", y="nats a character", log_x=True,
            rules={"nanoGPT's recipe": spread(r["recipe"])["mean"]},
        )  # fmt: skip
        steps = sorted((float(f) * r["steps"], spread(losses)["mean"]) for f, losses in r["by_fraction"].items())
        found[plot_name("steps", name)] = draw(
            f"Shorter schedules of {r['winner']}, mean of the seeds, {r['parameters']:,} parameters",
            [Line("", [s for s, _ in steps], [loss for _, loss in steps])],
            x="steps of the schedule", y="nats a character",
            rules={f"{r['best_adamw']}, {r['steps']} steps": best_of(r)["mean"]},
        )  # fmt: skip
    return found


def claims(result: dict) -> list[Claim]:
    found = []
    n = len(result["seeds"])
    for name, r in result["sizes"].items():
        wins = r["winner"] == "muon"
        found += [
            Claim(
                f"Muon needs about half of AdamW's steps for its loss (bar: 0.60); size {name}",
                "post 10739: nearly 2x; Moonlight's fit: 0.52 of the FLOPs",
                ratios(r), n, "yes" if wins and r["step_ratio"] <= 0.6 else "no", "muon_race",
            ),
            Claim(
                f"Muon at AdamW's best rate, nothing else touched, is no worse; size {name}", "post 10739",
                f"{plus_minus(r['at_adamws_lr_difference'])} nats a character against AdamW", n,
                holds(r["at_adamws_lr_difference"]["mean"], r["at_adamws_lr_difference"]["half"]), "muon_race",
            ),
            Claim(
                f"More than 90 % of the matrices end with a higher SVD entropy under Muon; size {name}",
                "Moonlight, Figure 4",
                f"{spread(r['entropy_higher'])['mean']:.0%} of the matrices", n,
                "yes" if spread(r["entropy_higher"])["mean"] > 0.9 else "no", "muon_race",
            ),
        ]  # fmt: skip
    return found
