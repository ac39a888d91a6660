"""Muon against AdamW in the same time, where AdamW also chooses its batch and its model.

A step of Muon takes longer than one of AdamW, and an optimizer may want another batch or another model: so equal steps
with one model flatter whoever the model was made for. Here Muon keeps the model, batch and rate of
:mod:`benchmarks.muon_race`, and AdamW gets as many steps as fill the time of Muon's run, by the time of a step that is
measured in turns with Muon's. Its batch is tuned, then with the best batch the width of its model, each from the race's
value on until the best has a worse one on either side, each with its rate swept the same way; the first seed tunes.
Then all seeds at the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.claims import Claim, holds, table
from benchmarks.muon_race import MUON, SIZES, START, adamw_arms
from benchmarks.study import SEEDS, Book, Run, arm_run, paired, plus_minus, race, spread, step_seconds
from quintic.core.files import atomic_write

BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)
WIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Factors on the race's batch and width."""
_PACE = "equal_time_pace.json"  # kept beside the runs: a study that goes on must not measure other numbers of steps


def run(
    book: Book | None = None,
    sizes: Mapping[str, tuple[Run, Sequence[float]]] = SIZES,
    start: Sequence[float] = START,
    seeds: Sequence[int] = SEEDS,
    rounds: int = 10,
) -> dict:
    from quintic.core.machine import describe, pick_device, pick_dtype

    book = book or Book("equal_time")
    device = pick_device("cpu")
    return {
        "machine": describe(device, pick_dtype("float32", device)),
        "seeds": list(seeds),
        "sizes": {name: one_size(book, *size, start, seeds, rounds) for name, size in sizes.items()},
    }


def shape_name(run: Run) -> str:
    return f"batch {run.batch}, width {run.width}"


def pace_of(book: Book, base: Run, shape: Run, rounds: int) -> float:
    """The time of AdamW's step at a shape over that of Muon's at the base, measured unless an earlier call did."""
    path = book.path.parent / _PACE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{base.layers} layers, {shape_name(shape)}, Muon with {shape_name(base)}"
    if key not in known:
        runs = {"muon": arm_run(base, MUON, 1e-3, 0), "adamw": arm_run(shape, {"optim": {"name": "adamw"}}, 1e-3, 0)}
        times = step_seconds(runs, rounds)
        known[key] = times["adamw"] / times["muon"]
        atomic_write(path, json.dumps(known, indent=1))
    return known[key]


def climb(ladder: Sequence[float], score: Callable[[float], float]) -> tuple[float, bool]:
    """The rung with the lowest score on the way down from 1 and its neighbours; and whether it has a worse one on
    either side.

    Example:
        >>> climb((0.25, 0.5, 1.0, 2.0), lambda rung: abs(rung - 0.4))
        (0.5, True)
        >>> climb((0.5, 1.0, 2.0), lambda rung: rung)
        (0.5, False)
    """
    middle = ladder.index(1.0)
    low, high = max(0, middle - 1), min(len(ladder) - 1, middle + 1)
    while True:
        best = min(ladder[low : high + 1], key=score)
        if best == ladder[low] and low > 0:
            low -= 1
        elif best == ladder[high] and high < len(ladder) - 1:
            high += 1
        else:
            return best, best not in (ladder[low], ladder[high])


def one_size(
    book: Book, base: Run, betas: Sequence[float], start: Sequence[float], seeds: Sequence[int], rounds: int
) -> dict[str, Any]:
    # The second beta and Muon's rate are those of the race, whose runs the book remembers.
    betas_arms = adamw_arms(betas)
    adamw = betas_arms[race(book, base, betas_arms, start, seeds).winner.name]
    muon = race(book, base, {"muon": MUON}, start, seeds).winner
    arms: dict[str, dict[str, Any]] = {}

    def tried(shape: Run) -> float:
        """Loss of the first seed at the best rate."""
        name = shape_name(shape)
        if name not in arms:
            pace = pace_of(book, base, shape, rounds)
            timed = replace(shape, steps=round(base.steps / pace))
            (arm,) = race(book, timed, {name: adamw}, start, seeds[:1]).arms
            arms[name] = {
                "name": name, "pace": pace, "steps": timed.steps, "best_lr": arm.best_lr, "interior": arm.interior,
                "sweep": {f"{lr:g}": loss for lr, loss in sorted(arm.sweep.items())},
            }  # fmt: skip
        return min(arms[name]["sweep"].values())

    def batched(factor: float) -> Run:
        return replace(base, batch=max(1, round(factor * base.batch)))

    def widened(factor: float) -> Run:
        return replace(batched(batch), width=round(factor * base.width))

    batch, batch_interior = climb(BATCHES, lambda factor: tried(batched(factor)))
    width, width_interior = climb(WIDTHS, lambda factor: tried(widened(factor)))
    best = widened(width)
    chosen = arms[shape_name(best)]
    timed = replace(best, steps=chosen["steps"])
    losses = [book(arm_run(timed, adamw, chosen["best_lr"], seed)).loss for seed in seeds]
    return {
        "muon": {"name": shape_name(base), "steps": base.steps, "best_lr": muon.best_lr, "losses": muon.losses},
        "adamw": list(arms.values()),
        "chosen": chosen["name"],
        "interior": {"batch": batch_interior, "width": width_interior},
        "losses": losses,
        "difference": paired(muon.losses, losses),
    }


def section(result: dict) -> str:
    parts = [
        "## Muon against AdamW in the same time",
        "`python -m benchmarks equal_time`: the race above once more, but AdamW trains for as long as Muon does, and "
        "its batch,\nthen the width of its model, are tuned too, each with its rate swept; Muon keeps what it had. "
        f"{len(result['seeds'])} seeds at the best.\nSteps fill the time of Muon's run by medians of steps in turns "
        f"on {result['machine']['cpu']}, one thread.",
    ]
    for name, r in result["sizes"].items():
        rows = [
            (arm["name"], f"{arm['pace']:.2f}", str(arm["steps"]), f"{arm['best_lr']:g}",
             "yes" if arm["interior"] else "no", f"{min(arm['sweep'].values()):.3f}")
            for arm in r["adamw"]
        ]  # fmt: skip
        parts += [
            f"### Size {name}",
            table(("AdamW", "time of a step over Muon's", "steps", "best rate", "interior", "loss, first seed"), rows),
            f"Best AdamW ({r['chosen']}): {plus_minus(spread(r['losses']))}. Muon ({r['muon']['name']}, "
            f"{r['muon']['steps']} steps): {plus_minus(spread(r['muon']['losses']))}. "
            f"Muon minus AdamW: {plus_minus(r['difference'])}. {edges(r['interior'])}",
        ]
    return "\n\n".join(parts)


def edges(interior: dict[str, bool]) -> str:
    """Whether the ladders were long enough, in words."""
    ends = [name for name, inside in interior.items() if not inside]
    if not ends:
        return "Best batch and best width have worse ones on either side."
    return f"The best {' and the best '.join(ends)} tried is the last of its ladder."


def claims(result: dict) -> list[Claim]:
    return [
        Claim(
            f"In equal time Muon's loss is at least 0.08 lower than AdamW's, whose batch and model are tuned too; "
            f"size {name}",
            "quintic", f"{plus_minus(r['difference'])} nats a character; AdamW with {r['chosen']}",
            len(result["seeds"]), holds(r["difference"]["mean"] + 0.08, r["difference"]["half"]), "equal_time",
        )
        for name, r in result["sizes"].items()
    ]  # fmt: skip
