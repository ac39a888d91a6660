"""Bits per dimension: TARFLOW beside MAF, a neural spline flow, RealNVP and Glow, at equal CPU time.

On Fashion-MNIST and on 5,000 digits of MNIST. All see the same images, dequantised with uniform noise and, but for one
arm, sent through the same logit transform, whose Jacobian counts; all train for as many steps as one thread does of
theirs in the same seconds, by the time of a step that is measured first, in turns; the rate is warmed up and then
lowered, and the weights are averaged. The peak rate of each is swept (seed 0, half of the steps, chosen on validation
images) until the best has a worse one on either side; if a full run with it ends in something that is no number, or
leaves out a hundredth of its steps because of that, the next best takes its place. TARFLOW and Glow, which come nearest
to each other, are there again with sizes chosen before, among equally many for each and in the same way: half of the
steps at the arm's usual rate, seed 0, on validation images. That TARFLOW has learned splines before and behind its
blocks (:mod:`quintic.flow.spline`), a second one also predicts each number of a token from those before it
(:mod:`quintic.flow.inner`); the last arm tells what such a spline does for Glow. Models:
:mod:`benchmarks.density_models`. Needs the extra ``bench`` and
``python -m benchmarks.fetch_data fashion-mnist digits``.

Everything measured leaves a file under ``runs/benchmarks/tarflow_likelihood`` and is skipped when it is there: a study
that was stopped goes on. Two processes share the arms; since steps are counted, it does not matter who runs beside.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, holds, table
from benchmarks.density_models import DIMS, SHAPE, glow, maf, realnvp, spline, tarflow
from benchmarks.fetch_data import fetch
from benchmarks.study import one_thread, paired, plus_minus, spread
from quintic.core.counter_rng import Stream
from quintic.core.files import atomic_write
from quintic.core.machine import describe
from quintic.data.images import ImageConfig, prepare_images
from quintic.flow.likelihood import bits, dequantise
from quintic.optim import Muon

FOLDER = Path("runs") / "benchmarks" / "tarflow_likelihood"
PACE = FOLDER / "pace.json"
SETS = {"fashion-mnist": ("Fashion-MNIST", 60), "digits": ("MNIST, 5,000 digits", 30)}
"""Title, and seconds of a run."""
SEEDS = (0, 1, 2)
FACTOR, MOST_RATES = 2.5, 6
"""Between the rates tried, from the usual one on; and how many are tried at most."""
ROUNDS, STEPS = 5, 4
"""Turns in which the time of a step is measured, and steps in each."""
AVERAGE = 0.998
WARMUP = 0.15
"""Share of a run, so that a short one of the sweep comes to its peak too."""


class Sizes(NamedTuple):
    """A model of some size, and how many images it sees at a time."""

    make: Callable[[], nn.Module]
    batch: int = 64


@dataclass(frozen=True)
class Arm:
    """A kind of model, the optimizer that it is trained with, and its usual peak rate."""

    sizes: dict[str, Sizes]
    """By name; the best on validation images is taken."""
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float


def usual(make: Callable[[], nn.Module]) -> dict[str, Sizes]:
    return {"": Sizes(make)}


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return Muon(model, lr=lr, weight_decay=0.01)


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


BINS = 16
TARFLOW_SIZES = {
    f"patch {patch}, {blocks} blocks of 1 layer, width {width}, batch {batch}": Sizes(
        partial(tarflow, patch, width, blocks, 1, spline_bins=BINS), batch
    )
    for patch, blocks, width, batch in (
        (4, 4, 32, 16), (4, 4, 64, 16), (4, 8, 32, 16), (2, 4, 32, 8), (2, 4, 32, 16), (2, 4, 64, 8),
    )
}  # fmt: skip
INNER_SIZES = {
    f"patch {patch}, {blocks} blocks of {layers} layer{'s' * (layers > 1)}, width 32, batch {batch}": Sizes(
        partial(tarflow, patch, 32, blocks, layers, spline_bins=BINS, inner_width=8 * patch * patch), batch
    )
    for patch, blocks, layers, batch in (
        (4, 2, 1, 16), (4, 2, 2, 16), (4, 4, 1, 16), (2, 2, 1, 8), (2, 2, 2, 8), (2, 4, 1, 8),
    )
}  # fmt: skip


def glow_sizes(bins: int) -> dict[str, Sizes]:
    return {
        f"{steps} steps, hidden {hidden}, batch {batch}": Sizes(partial(glow, steps, hidden, bins), batch)
        for steps, hidden, batch in ((4, 32, 16), (4, 64, 8), (4, 64, 16), (4, 64, 32), (8, 32, 16), (8, 64, 16))
    }


ARMS = {
    "TARFLOW with splines, number by number, Muon, sizes chosen": Arm(INNER_SIZES, _muon, 0.01),
    "TARFLOW with splines, Muon, sizes chosen": Arm(TARFLOW_SIZES, _muon, 0.01),
    "Glow (normflows), sizes chosen": Arm(glow_sizes(0), _adam, 0.015625),
    "TARFLOW, Muon": Arm(usual(tarflow), _muon, 0.01),
    "TARFLOW, AdamW": Arm(usual(tarflow), _adamw, 0.00625),
    "TARFLOW without logits, Muon": Arm(usual(lambda: tarflow(preprocess="scale")), _muon, 0.004),
    "MAF (zuko)": Arm(usual(maf), _adam, 0.003125),
    "neural spline flow (zuko)": Arm(usual(spline), _adam, 0.003125),
    "RealNVP (normflows)": Arm(usual(realnvp), _adam, 0.00125),
    "Glow (normflows)": Arm(usual(glow), _adam, 0.015625),
    "Glow (normflows) behind a spline, sizes chosen": Arm(glow_sizes(BINS), _adam, 0.015625),
}
CLAIMS = (
    ("a TARFLOW is trained to fewer bits per dimension by Muon than by AdamW, both tuned", "TARFLOW, Muon",
     "TARFLOW, AdamW"),
    ("logits save a TARFLOW bits per dimension", "TARFLOW, Muon", "TARFLOW without logits, Muon"),
    ("fewer bits per dimension than Glow, both of usual sizes", "TARFLOW, Muon", "Glow (normflows)"),
    ("with splines fewer than Glow, sizes of both chosen", "TARFLOW with splines, Muon, sizes chosen",
     "Glow (normflows), sizes chosen"),
    ("number by number with splines fewer than Glow behind a spline, sizes of both chosen",
     "TARFLOW with splines, number by number, Muon, sizes chosen", "Glow (normflows) behind a spline, sizes chosen"),
    ("number by number fewer than by whole tokens, sizes of both chosen",
     "TARFLOW with splines, number by number, Muon, sizes chosen", "TARFLOW with splines, Muon, sizes chosen"),
    *((f"fewer than {peer}", "TARFLOW, Muon", peer)
      for peer in ("MAF (zuko)", "neural spline flow (zuko)", "RealNVP (normflows)")),
)  # fmt: skip
"""Words, the arm that should be below, the other."""


def images(name: str) -> dict[str, Tensor]:
    """Images of train, validation and test (n, 1, 28, 28) uint8."""
    data = prepare_images([fetch(name)], ImageConfig(channels="grey", validation_fraction=1 / 12))
    return {
        split: torch.from_numpy(getattr(data, split).images).permute(0, 3, 1, 2).contiguous()
        for split in ("train", "validation", "test")
    }


class Training:
    """An arm that trains step by step, and keeps an average of its weights."""

    def __init__(self, title: str, sizes: str, lr: float, seed: int, steps: int, images: Tensor) -> None:
        torch.manual_seed(seed)
        make, self.batch = ARMS[title].sizes[sizes]
        self.model = make()
        self.average = copy.deepcopy(self.model)
        self.optimizer = ARMS[title].optimizer(self.model, lr)
        self.lr, self.seed, self.steps, self.images = lr, seed, steps, images
        self.step = self.skipped = 0

    def advance(self) -> None:
        """One step; one whose gradient is not finite is counted and leaves the weights alone."""
        step = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (step + 1) / (WARMUP * self.steps), 2.5 * (1.0 - step / self.steps))
        rows = torch.from_numpy(Stream(self.seed, "batch", step).integers(0, self.batch, len(self.images)))
        x = dequantise(self.images[rows], torch.rand(self.batch, *SHAPE), 256)
        loss = -self.model.log_prob(x).mean() / DIMS
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if math.isfinite(float(norm)):
            self.optimizer.step()
        else:
            self.skipped += 1
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1.0 - decay)
                else:
                    mean.copy_(value)
        self.step += 1


def pace(images: Tensor) -> dict[str, dict[str, float]]:
    """Seconds of a step of every arm and size: the smallest of some turns."""
    trainings = {
        (title, sizes): Training(title, sizes, arm.lr, 0, 10**6, images)
        for title, arm in ARMS.items()
        for sizes in arm.sizes
    }
    found = dict.fromkeys(trainings, math.inf)
    for _ in range(1 + ROUNDS):
        for key, training in trainings.items():
            begun = time.perf_counter()
            for _ in range(STEPS):
                training.advance()
            found[key] = min(found[key], (time.perf_counter() - begun) / STEPS)
    return {title: {sizes: found[title, sizes] for sizes in arm.sizes} for title, arm in ARMS.items()}


@torch.no_grad()
def bits_of(model: nn.Module, images: Tensor) -> float:
    """Mean bits per dimension, the noise by number of the image: the same for every model. Infinite if not a number."""
    total = 0.0
    for first in range(0, len(images), 100):
        part = images[first : first + 100]
        uniform = Stream(0, "test noise").uniform(first * DIMS, part.numel())
        x = dequantise(part, torch.from_numpy(uniform).float().view(part.shape), 256)
        total += float(bits(model.log_prob(x), DIMS, 256).double().sum())
    return total / len(images) if math.isfinite(total) else math.inf


def remembered(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured, unless an earlier call left its result."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(measure()))
        print(path, path.read_text(), flush=True)
    return json.loads(path.read_text())


def sweep(first: float, score: Callable[[float], float]) -> dict[float, float]:
    """{rate: score} around the best, which has a worse one on either side unless they got too many."""
    scores = {lr: score(lr) for lr in (first / FACTOR, first, first * FACTOR)}
    while len(scores) < MOST_RATES:
        best, rates = min(scores, key=lambda lr: scores[lr]), sorted(scores)
        if best not in (rates[0], rates[-1]):
            break
        beyond = best / FACTOR if best == rates[0] else best * FACTOR
        scores[beyond] = score(beyond)
    return dict(sorted(scores.items()))


def sound(runs: list[dict[str, Any]], steps: int) -> bool:
    """Whether full runs ended in numbers and left out few steps."""
    return all(math.isfinite(run["bits_per_dim"]) and 100 * run["skipped"] <= steps for run in runs)


def measure(name: str, title: str) -> dict[str, Any]:
    """One arm on one set: sizes and rate chosen on validation images, then all seeds on test images."""
    data, arm, seconds = images(name), ARMS[title], SETS[name][1]
    pace = json.loads(PACE.read_text())[title]
    steps = {sizes: round(seconds / pace[sizes]) for sizes in arm.sizes}

    def trained(sizes: str, lr: float, seed: int, steps: int, images: Tensor) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            training = Training(title, sizes, lr, seed, steps, data["train"])
            while training.step < steps:
                training.advance()
            size = sum(p.numel() for p in training.model.parameters())
            bits = bits_of(training.average.eval(), images)
            return {"bits_per_dim": bits, "parameters": size, "skipped": training.skipped}

        label = re.sub("[^a-zA-Z0-9]+", "-", f"{title} {sizes}").strip("-")
        return remembered(FOLDER / name / f"{label}-{lr:.3g}-{seed}-{steps}.json", train)

    def tried(sizes: str, lr: float) -> float:
        return trained(sizes, lr, 0, steps[sizes] // 2, data["validation"][:1000])["bits_per_dim"]

    of_sizes = {sizes: tried(sizes, arm.lr) for sizes in arm.sizes}
    chosen = min(of_sizes, key=lambda sizes: of_sizes[sizes])
    of_rates = sweep(arm.lr, lambda lr: tried(chosen, lr))
    broken, runs, best = [], [], math.nan
    for best in sorted(of_rates, key=lambda lr: of_rates[lr]):
        runs = [trained(chosen, best, seed, steps[chosen], data["test"]) for seed in SEEDS]
        if sound(runs, steps[chosen]):
            break
        broken.append(best)
    return {
        "sizes": of_sizes, "best_sizes": chosen, "sweep": {f"{lr:.3g}": value for lr, value in of_rates.items()},
        "best_lr": best, "broken_lrs": broken, "parameters": runs[0]["parameters"], "steps": steps[chosen],
        "skipped": sum(r["skipped"] for r in runs), "bits_per_dim": [r["bits_per_dim"] for r in runs],
    }  # fmt: skip


def workers(processes: int) -> ProcessPoolExecutor:
    """Fresh processes of one thread each."""
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))


def run(processes: int = 2) -> dict[str, Any]:
    with one_thread():
        remembered(PACE, lambda: pace(images("digits")["train"]))
        jobs = [(name, title) for title in ARMS for name in SETS]
        if processes == 1:
            rows = [measure(*job) for job in jobs]
        else:
            with workers(processes) as pool:
                rows = list(pool.map(measure, *zip(*jobs, strict=True)))
    found: dict[str, Any] = {name: {} for name in SETS}
    for (name, title), row in zip(jobs, rows, strict=True):
        found[name][title] = row
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, "seeds": list(SEEDS), "sets": found}


def claims(result: dict[str, Any]) -> list[Claim]:
    made = []
    for name, arms in result["sets"].items():
        for words, one, other in CLAIMS:
            if one in arms and other in arms:
                gap = paired(arms[one]["bits_per_dim"], arms[other]["bits_per_dim"])
                made.append(Claim(
                    f"{SETS[name][0]}, equal CPU time: {words}", "ours", plus_minus(gap), len(result["seeds"]),
                    holds(gap["mean"], gap["half"]), "tarflow_likelihood",
                ))  # fmt: skip
    return made


def section(result: dict[str, Any]) -> str:
    m = result["machine"]
    parts = [
        "## TARFLOW: likelihood",
        "`python -m benchmarks tarflow_likelihood`: test images, mean of "
        f"{len(result['seeds'])} seeds. {m['cpu']}, torch {m['torch']}.\n\n"
        "* Every model trains for as many steps as one thread makes in the same time; times of a step are measured in "
        "turns.\n"
        "* Batch 64 unless stated, uniform dequantisation, logits in all arms but one, averaged weights.\n"
        "* The peak rate of each is swept on validation images to an interior optimum. *Broken* are rates that were "
        "better there, but whose full runs were not finite.\n"
        "* *Sizes chosen*: the best of those listed below, by runs of half the steps at one rate, on validation "
        "images.\n"
        f"* *Splines*: a learned monotone map of {BINS} bins, one for all pixels, before the blocks; a TARFLOW has "
        "another one behind them.\n"
        "* *Number by number*: each number of a token is also predicted from those before it, by 8 hidden numbers "
        "each.",
    ]
    for name, arms in result["sets"].items():
        title, seconds = SETS[name]
        rows = [
            (arm, f"{r['parameters']:,}", f"{r['steps']:,}", f"{r['best_lr']:.3g}",
             ", ".join(f"{lr:.3g}" for lr in r["broken_lrs"]), plus_minus(spread(r["bits_per_dim"])), str(r["skipped"]))
            for arm, r in arms.items()
        ]  # fmt: skip
        head = ("model", "parameters", "steps", "best rate", "broken", "test bits per dimension", "steps left out")
        parts += [f"**{title}**, {seconds} seconds", table(head, rows)]
        rows = [
            (arm, f"**{sizes}**" if sizes == r["best_sizes"] else sizes, f"{value:.3f}")
            for arm, r in arms.items()
            for sizes, value in r.get("sizes", {}).items()
            if sizes
        ]
        if rows:
            parts.append(table(("model", "sizes", "validation bits per dimension at half of the steps"), rows))
    return "\n\n".join(parts)
