"""Bits per dimension: TARFLOW beside MAF, a neural spline flow, RealNVP and Glow, at equal CPU time.

On Fashion-MNIST and on 5,000 digits of MNIST. All see the same images, dequantised with uniform noise and, but for one
arm, sent through the same logit transform, whose Jacobian counts; all train for as many steps as one thread does of
theirs in the same seconds, by the time of a step that is measured first, in turns; the rate is warmed up and then
lowered, and the weights are averaged. The peak rate of each is swept (seed 0, half of the steps, chosen on validation
images) until the best has a worse one on either side; if a full run with it ends in something that is no number, or
leaves out a hundredth of its steps because of that, the next best takes its place. MAF and the spline flow are zuko's,
RealNVP (couplings over pixels in turns, as in its authors' toy) and Glow are normflows'. Needs the extra ``bench`` and
``python -m benchmarks.fetch_data fashion-mnist digits``.

Everything measured leaves a file under ``runs/benchmarks/tarflow_likelihood`` and is skipped when it is there: a study
that was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, holds, table
from benchmarks.fetch_data import fetch
from benchmarks.study import one_thread, paired, plus_minus, spread
from quintic.core.counter_rng import Stream
from quintic.core.files import atomic_write
from quintic.core.machine import describe
from quintic.data.images import ImageConfig, prepare_images
from quintic.flow import TarFlow
from quintic.flow.likelihood import bits, dequantise, logit_forward
from quintic.optim import Muon

FOLDER = Path("runs") / "benchmarks" / "tarflow_likelihood"
SETS = {"fashion-mnist": ("Fashion-MNIST", 90), "digits": ("MNIST, 5,000 digits", 30)}
"""Title, and seconds of a run."""
SEEDS = (0, 1, 2)
FACTOR, MOST_RATES = 2.5, 6
"""Between the rates tried, from the usual one on; and how many are tried at most."""
ROUNDS, STEPS = 5, 4
"""Turns in which the time of a step is measured, and steps in each."""
SHAPE = (1, 28, 28)
DIMS = 784
AVERAGE = 0.998
WARMUP = 0.15
"""Share of a run, so that a short one of the sweep comes to its peak too."""
BATCH = 64


@dataclass(frozen=True)
class Arm:
    """A model, the optimizer that it is trained with, and its usual peak rate."""

    make: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float


class Peer(nn.Module):
    """A density over logits as a density over pixels; flat where the peer wants it flat."""

    def __init__(self, flow: nn.Module, log_prob: Callable[[Any, Tensor], Tensor], flat: bool) -> None:
        super().__init__()
        self.flow, self._log_prob, self.flat = flow, log_prob, flat

    def log_prob(self, x: Tensor) -> Tensor:
        u, logdet = logit_forward(x)
        return self._log_prob(self.flow, u.flatten(1) if self.flat else u) + logdet


def tarflow(preprocess: str = "logit") -> nn.Module:
    return TarFlow(
        SHAPE, patch=4, width=64, blocks=4, layers=2, noise="uniform", preprocess=preprocess,
        seed=int(torch.randint(2**31, ())),
    )  # fmt: skip


def maf() -> nn.Module:
    import zuko

    flow = zuko.flows.MAF(DIMS, transforms=5, hidden_features=(512, 512))
    return Peer(flow, lambda f, u: f().log_prob(u), True)


def spline() -> nn.Module:
    import zuko

    flow = zuko.flows.NSF(DIMS, transforms=3, hidden_features=(256, 256), bins=8)
    return Peer(flow, lambda f, u: f().log_prob(u), True)


def realnvp() -> nn.Module:
    import normflows as nf

    mask = torch.arange(DIMS) % 2
    layers = []
    for i in range(8):
        nets = [nf.nets.MLP([DIMS, 256, DIMS], init_zeros=True) for _ in range(2)]
        layers += [nf.flows.MaskedAffineFlow(mask if i % 2 else 1 - mask, *nets), nf.flows.ActNorm(DIMS)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(DIMS, trainable=False), layers)
    return Peer(flow, lambda f, u: f.log_prob(u), True)


def glow() -> nn.Module:
    import normflows as nf

    levels, steps, hidden = 2, 8, 64
    bases, merges, flows = [], [], []
    for i in range(levels):
        channels = 2 ** (levels + 1 - i)
        flows.append([nf.flows.GlowBlock(channels, hidden) for _ in range(steps)] + [nf.flows.Squeeze()])
        shape = (channels, 28 // 2 ** (levels - i), 28 // 2 ** (levels - i))
        if i > 0:
            merges.append(nf.flows.Merge())
            shape = (channels // 2, *shape[1:])
        if i == 0:
            shape = (channels, *shape[1:])
        bases.append(nf.distributions.DiagGaussian(shape))
    flow = nf.MultiscaleFlow(bases, flows, merges)
    return Peer(flow, lambda f, u: f.log_prob(u, None), False)


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return Muon(model, lr=lr, weight_decay=0.01)


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


ARMS = {
    "TARFLOW, Muon": Arm(tarflow, _muon, 0.01),
    "TARFLOW, AdamW": Arm(tarflow, _adamw, 1e-3),
    "TARFLOW without logits, Muon": Arm(lambda: tarflow("scale"), _muon, 0.01),
    "MAF (zuko)": Arm(maf, _adam, 5e-4),
    "neural spline flow (zuko)": Arm(spline, _adam, 5e-4),
    "RealNVP (normflows)": Arm(realnvp, _adam, 5e-4),
    "Glow (normflows)": Arm(glow, _adam, 1e-3),
}
OURS = "TARFLOW, Muon"


def images(name: str) -> dict[str, Tensor]:
    """Images of train, validation and test (n, 1, 28, 28) uint8."""
    data = prepare_images([fetch(name)], ImageConfig(channels="grey", validation_fraction=1 / 12))
    return {
        split: torch.from_numpy(getattr(data, split).images).permute(0, 3, 1, 2).contiguous()
        for split in ("train", "validation", "test")
    }


class Training:
    """An arm that trains step by step, and keeps an average of its weights."""

    def __init__(self, title: str, lr: float, seed: int, steps: int, images: Tensor) -> None:
        torch.manual_seed(seed)
        self.model = ARMS[title].make()
        self.average = copy.deepcopy(self.model)
        self.optimizer = ARMS[title].optimizer(self.model, lr)
        self.lr, self.seed, self.steps, self.images = lr, seed, steps, images
        self.step = self.skipped = 0

    def advance(self) -> None:
        """One step; one whose gradient is not finite is counted and leaves the weights alone."""
        step = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (step + 1) / (WARMUP * self.steps), 2.5 * (1.0 - step / self.steps))
        rows = torch.from_numpy(Stream(self.seed, "batch", step).integers(0, BATCH, len(self.images)))
        x = dequantise(self.images[rows], torch.rand(BATCH, *SHAPE), 256)
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


def pace(images: Tensor) -> dict[str, float]:
    """Seconds of a step of every arm: the smallest of some turns."""
    trainings = {title: Training(title, arm.lr, 0, 10**6, images) for title, arm in ARMS.items()}
    found = dict.fromkeys(trainings, math.inf)
    for _ in range(1 + ROUNDS):
        for title, training in trainings.items():
            begun = time.perf_counter()
            for _ in range(STEPS):
                training.advance()
            found[title] = min(found[title], (time.perf_counter() - begun) / STEPS)
    return found


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


def measure(name: str, title: str, data: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """One arm on one set: rate swept on validation images, then all seeds on test images."""

    def trained(lr: float, seed: int, steps: int, images: Tensor) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            training = Training(title, lr, seed, steps, data["train"])
            while training.step < steps:
                training.advance()
            size = sum(p.numel() for p in training.model.parameters())
            bits = bits_of(training.average.eval(), images)
            return {"bits_per_dim": bits, "parameters": size, "skipped": training.skipped}

        label = re.sub("[^a-zA-Z]+", "-", title).strip("-")
        return remembered(FOLDER / name / f"{label}-{lr:.3g}-{seed}-{steps}.json", train)

    few = data["validation"][:1000]
    tried = sweep(ARMS[title].lr, lambda lr: trained(lr, 0, steps // 2, few)["bits_per_dim"])
    broken, runs, best = [], [], math.nan
    for best in sorted(tried, key=lambda lr: tried[lr]):
        runs = [trained(best, seed, steps, data["test"]) for seed in SEEDS]
        if sound(runs, steps):
            break
        broken.append(best)
    return {
        "sweep": {f"{lr:.3g}": value for lr, value in tried.items()}, "best_lr": best, "broken_lrs": broken,
        "parameters": runs[0]["parameters"], "steps": steps,
        "skipped": sum(r["skipped"] for r in runs), "bits_per_dim": [r["bits_per_dim"] for r in runs],
    }  # fmt: skip


def run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with one_thread():
        step_seconds = remembered(FOLDER / "pace.json", lambda: pace(images("digits")["train"]))
        for name, (_, seconds) in SETS.items():
            data = images(name)
            found[name] = {title: measure(name, title, data, round(seconds / step_seconds[title])) for title in ARMS}
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, "seeds": list(SEEDS), "sets": found}


def claims(result: dict[str, Any]) -> list[Claim]:
    made = []
    for name, arms in result["sets"].items():
        for arm, row in arms.items():
            if arm != OURS:
                gap = paired(arms[OURS]["bits_per_dim"], row["bits_per_dim"])
                made.append(Claim(
                    f"{SETS[name][0]}: fewer bits per dimension than {arm}, at equal CPU time", "own bar",
                    plus_minus(gap), len(result["seeds"]), holds(gap["mean"], gap["half"]), "tarflow_likelihood",
                ))  # fmt: skip
    return made


def section(result: dict[str, Any]) -> str:
    m = result["machine"]
    parts = [
        "## TARFLOW: likelihood",
        "`python -m benchmarks tarflow_likelihood`. As many steps each as one thread does in the same seconds, by the "
        f"time of a step measured in turns; batch {BATCH}, uniform dequantisation and, but for one arm, logits; the "
        "peak rate of each swept on validation images to an interior optimum (broken: rates that were better there, "
        "but whose full runs were not finite); averaged weights; test images, mean of "
        f"{len(result['seeds'])} seeds with half of a 95 % interval. {m['cpu']}, torch {m['torch']}.",
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
    return "\n\n".join(parts)
