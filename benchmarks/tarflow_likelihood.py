"""Bits per dimension: TARFLOW beside MAF, a neural spline flow, RealNVP and Glow, at equal CPU time.

On Fashion-MNIST and on 5,000 digits of MNIST. All see the same images, dequantised with uniform noise and, but for one
arm, sent through the same logit transform, whose Jacobian counts; all train for the same CPU seconds on one thread, the
rate warmed up and then lowered over that time, and keep an average of their weights. The peak rate of each is swept
(three rates, seed 0, a quarter of the time, chosen on validation images). MAF and the spline flow are zuko's, RealNVP
(couplings over pixels in turns, as in its authors' toy) and Glow are normflows'. Needs the extra ``bench`` and
``python -m benchmarks.fetch_data fashion-mnist digits``.

Every run leaves a line under ``runs/benchmarks/tarflow_likelihood`` and is skipped when it is there: a study that was
stopped goes on.
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
SETS = {"fashion-mnist": ("Fashion-MNIST", 120), "digits": ("MNIST, 5,000 digits", 40)}
"""Title, and CPU seconds of a run."""
SEEDS = (0, 1, 2)
SWEEP = (0.4, 1.0, 2.5)
"""Rates tried, times the arm's usual one."""
SHAPE = (1, 28, 28)
DIMS = 784
AVERAGE = 0.998
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


def train(name: str, lr: float, seed: int, seconds: float, data: dict[str, Tensor], split: str) -> dict[str, Any]:
    """Train an arm for some CPU seconds and measure the averaged weights on a split."""
    torch.manual_seed(seed)
    arm, images = ARMS[name], data["train"]
    model = arm.make()
    optimizer, average = arm.optimizer(model, lr), copy.deepcopy(model)
    begun, step, skipped = time.process_time(), 0, 0
    while (spent := (time.process_time() - begun) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100, 2.5 * (1.0 - spent))
        rows = torch.from_numpy(Stream(seed, "batch", step).integers(0, BATCH, len(images)))
        x = dequantise(images[rows], torch.rand(BATCH, *SHAPE), 256)
        loss = -model.log_prob(x).mean() / DIMS
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if math.isfinite(float(norm)):
            optimizer.step()
        else:
            skipped += 1
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1.0 - decay)
                else:
                    mean.copy_(value)
        step += 1
    return {
        "arm": name, "lr": lr, "seed": seed, "seconds": seconds, "steps": step, "skipped": skipped,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_dim": bits_of(average.eval(), data[split]),
    }  # fmt: skip


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


def remembered(
    name: str, title: str, lr: float, seed: int, seconds: float, data: dict[str, Tensor], split: str
) -> dict[str, Any]:
    """:func:`train`, unless an earlier call left its result."""
    path = FOLDER / name / f"{re.sub('[^a-zA-Z]+', '-', title)}-{lr:.3g}-{seed}-{seconds:g}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(train(title, lr, seed, seconds, data, split)))
        print(name, path.stem, json.loads(path.read_text())["bits_per_dim"], flush=True)
    return json.loads(path.read_text())


def measure(name: str, title: str, data: dict[str, Tensor], seconds: float) -> dict[str, Any]:
    """One arm on one set: rate swept on validation images, then all seeds on test images."""
    rates = [ARMS[title].lr * factor for factor in SWEEP]
    few = {**data, "validation": data["validation"][:1000]}
    sweep = {lr: remembered(name, title, lr, 0, seconds / 4, few, "validation")["bits_per_dim"] for lr in rates}
    best = min(rates, key=lambda lr: sweep[lr])
    runs = [remembered(name, title, best, seed, seconds, data, "test") for seed in SEEDS]
    return {
        "sweep": {f"{lr:.3g}": value for lr, value in sweep.items()}, "best_lr": best,
        "parameters": runs[0]["parameters"], "steps": runs[0]["steps"],
        "skipped": sum(r["skipped"] for r in runs), "bits_per_dim": [r["bits_per_dim"] for r in runs],
    }  # fmt: skip


def run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with one_thread():
        for name, (_, seconds) in SETS.items():
            data = images(name)
            found[name] = {title: measure(name, title, data, seconds) for title in ARMS}
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
        f"`python -m benchmarks tarflow_likelihood`. As many CPU seconds of training each, one thread, batch {BATCH}, "
        "uniform dequantisation and, but for one arm, logits; the peak rate of each swept on validation images over "
        f"{', '.join(f'{x:g}' for x in SWEEP)} times its usual one; averaged weights; test images, mean of "
        f"{len(result['seeds'])} seeds with half of a 95 % interval. {m['cpu']}, torch {m['torch']}.",
    ]
    for name, arms in result["sets"].items():
        title, seconds = SETS[name]
        rows = [
            (arm, f"{r['parameters']:,}", f"{r['steps']:,}", f"{r['best_lr']:g}", plus_minus(spread(r["bits_per_dim"])),
             str(r["skipped"]))
            for arm, r in arms.items()
        ]  # fmt: skip
        head = ("model", "parameters", "steps", "best rate", "test bits per dimension", "steps left out: not finite")
        parts += [f"**{title}**, {seconds} CPU seconds", table(head, rows)]
    return "\n\n".join(parts)
