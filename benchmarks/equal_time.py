"""Muon against AdamW in the same time, where both also choose their batch and their model.

A step of Muon takes longer than one of AdamW, and an optimizer may want another batch or another model: so equal steps
with one model flatter whoever the model was made for. Here the time is that of Muon's run in the race
(:mod:`benchmarks.muon_race`), and every run has as many steps as fill it, by the time of a step that is measured in
turns with that of the race's Muon. The batch is tuned, then with the best batch the width of the model, each from the
race's value on until the best has a worse one on either side, each with its rate swept the same way; the first seed
tunes. Then all seeds at the best.
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
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
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


def pace_of(book: Book, base: Run, shape: Run, name: str, rounds: int) -> float:
    """Time of an optimizer's step at a shape over that of Muon's at the base, measured unless an earlier call did."""
    if name == "muon" and shape == base:
        return 1.0
    path = book.path.parent / _PACE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{name}, {base.layers} layers, {shape_name(shape)}; Muon with {shape_name(base)}"
    if key not in known:
        runs = {"muon": arm_run(base, MUON, 1e-3, 0), "other": arm_run(shape, {"optim": {"name": name}}, 1e-3, 0)}
        times = step_seconds(runs, rounds)
        known[key] = times["other"] / times["muon"]
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
    # The second beta is that of the race, whose runs the book remembers.
    betas_arms = adamw_arms(betas)
    adamw = betas_arms[race(book, base, betas_arms, start, seeds).winner.name]
    sides = {name: tuned(book, base, arm, start, seeds, rounds) for name, arm in (("muon", MUON), ("adamw", adamw))}
    return {**sides, "difference": paired(sides["muon"]["losses"], sides["adamw"]["losses"])}


def tuned(
    book: Book, base: Run, arm: Mapping[str, Any], start: Sequence[float], seeds: Sequence[int], rounds: int
) -> dict[str, Any]:
    """One optimizer with the batch, width and rate that are best in the time."""
    name, tries = arm["optim"]["name"], {}

    def tried(shape: Run) -> float:
        """Loss of the first seed at the best rate."""
        label = shape_name(shape)
        if label not in tries:
            pace = pace_of(book, base, shape, name, rounds)
            timed = replace(shape, steps=round(base.steps / pace))
            (found,) = race(book, timed, {f"{name}, {label}": arm}, start, seeds[:1]).arms
            tries[label] = {
                "name": label, "pace": pace, "steps": timed.steps, "best_lr": found.best_lr,
                "interior": found.interior, "sweep": {f"{lr:g}": loss for lr, loss in sorted(found.sweep.items())},
            }  # fmt: skip
        return min(tries[label]["sweep"].values())

    def batched(factor: float) -> Run:
        return replace(base, batch=max(1, round(factor * base.batch)))

    def widened(factor: float) -> Run:
        return replace(batched(batch), width=round(factor * base.width))

    batch, batch_interior = climb(BATCHES, lambda factor: tried(batched(factor)))
    width, width_interior = climb(WIDTHS, lambda factor: tried(widened(factor)))
    best = widened(width)
    chosen = tries[shape_name(best)]
    timed = replace(best, steps=chosen["steps"])
    return {
        "tries": list(tries.values()),
        "chosen": chosen["name"],
        "steps": chosen["steps"],
        "interior": {"batch": batch_interior, "width": width_interior},
        "losses": [book(arm_run(timed, arm, chosen["best_lr"], seed)).loss for seed in seeds],
    }


def section(result: dict) -> str:
    parts = [
        "## Muon against AdamW in the same time",
        "`python -m benchmarks equal_time`: the race above once more, but both train for as long as Muon did there, "
        "and the batch,\nthen the width of the model, are tuned too, each with its rate swept. "
        f"{len(result['seeds'])} seeds at the best.\nSteps fill the time by medians of steps in turns on "
        f"{result['machine']['cpu']}, one thread.",
    ]
    for name, r in result["sizes"].items():
        rows = [
            (title, each["name"], f"{each['pace']:.2f}", str(each["steps"]), f"{each['best_lr']:g}",
             "yes" if each["interior"] else "no", f"{min(each['sweep'].values()):.3f}")
            for title, side in (("Muon", r["muon"]), ("AdamW", r["adamw"]))
            for each in side["tries"]
        ]  # fmt: skip
        head = ("optimizer", "shape", "time of a step", "steps", "best rate", "interior", "loss, first seed")
        parts += [
            f"### Size {name}",
            table(head, rows),
            *(words(title, r[title.lower()]) for title in ("Muon", "AdamW")),
        ]
        untouched = next(min(each["sweep"].values()) for each in r["muon"]["tries"] if each["pace"] == 1.0)
        parts.append(
            f"Muon minus AdamW: {plus_minus(r['difference'])}. With the race's own batch and width, first seed, Muon "
            f"minus the best AdamW is {untouched - r['adamw']['losses'][0]:.3f}."
        )
    return "\n\n".join(parts)


def words(title: str, side: dict[str, Any]) -> str:
    """The best of one optimizer."""
    return f"Best {title} ({side['chosen']}): {plus_minus(spread(side['losses']))}. {edges(side['interior'])}"


def edges(interior: dict[str, bool]) -> str:
    """Whether the ladders were long enough, in words."""
    ends = [name for name, inside in interior.items() if not inside]
    if not ends:
        return "Best batch and best width have worse ones on either side."
    return f"The best {' and the best '.join(ends)} tried is the last of its ladder."


def claims(result: dict) -> list[Claim]:
    return [
        Claim(
            f"In equal time Muon's loss is at least 0.08 lower than AdamW's, batch and width tuned too; size {name}",
            "ours", f"{plus_minus(r['difference'])} nats a character",
            len(result["seeds"]), holds(r["difference"]["mean"] + 0.08, r["difference"]["half"]), "equal_time",
        )
        for name, r in result["sizes"].items()
    ]  # fmt: skip
