"""Bits per dimension on Fashion-MNIST: TARFLOW beside MAF, a neural spline flow, RealNVP and Glow, at equal CPU time.

All see the same images, dequantised with uniform noise and, but for one arm, sent through the same logit transform,
whose Jacobian counts; all train with Adam for the same CPU seconds on one thread, the rate warmed up and then lowered
over that time, and keep an average of their weights. MAF and the spline flow are zuko's, RealNVP (a convolutional one
would be Glow without its 1 x 1 convolutions: here couplings over pixels in turns, as in its authors' toy) and Glow are
normflows'. Needs the extra ``bench`` and ``QUINTIC_FASHION_MNIST``, a folder with the four idx files.

Every arm leaves a result under ``runs/benchmarks/tarflow_likelihood`` and is skipped when it is there: a study that was
stopped goes on. Seconds per arm by ``QUINTIC_STUDY_SECONDS`` (240 by default: 6 arms x 3 seeds are 72 minutes).
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, holds, table
from benchmarks.study import one_thread
from quintic.core import DataError
from quintic.core.counter_rng import Stream
from quintic.core.machine import describe
from quintic.data.images import ImageConfig, prepare_images
from quintic.flow import TarFlow
from quintic.flow.likelihood import bits, dequantise, logit_forward
from quintic.optim import Muon

FOLDER = Path("runs") / "benchmarks" / "tarflow_likelihood"
DATA = "QUINTIC_FASHION_MNIST"
SEEDS = (0, 1, 2)
SHAPE = (1, 28, 28)
DIMS = 784
TEST_IMAGES = 10_000
AVERAGE = 0.998


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


def _adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.Adam(model.parameters(), lr=lr)


ARMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "TARFLOW, Muon": (tarflow, lambda model: Muon(model, lr=0.01, weight_decay=0.01)),
    "TARFLOW, AdamW": (tarflow, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))),
    "TARFLOW without logits, Muon": (lambda: tarflow("scale"), lambda model: Muon(model, lr=0.01, weight_decay=0.01)),
    "MAF (zuko)": (maf, _adam(5e-4)),
    "neural spline flow (zuko)": (spline, _adam(5e-4)),
    "RealNVP (normflows)": (realnvp, _adam(5e-4)),
    "Glow (normflows)": (glow, _adam(1e-3)),
}
BATCH = 64


def images() -> tuple[Tensor, Tensor]:
    """Training and test images (n, 1, 28, 28) uint8."""
    folder = os.environ.get(DATA)
    if not folder:
        raise DataError(f"set {DATA} to a folder with the idx files of Fashion-MNIST")
    data = prepare_images([Path(folder)], ImageConfig(channels="grey", validation_fraction=0.0))
    return tuple(torch.from_numpy(s.images).permute(0, 3, 1, 2).contiguous() for s in (data.train, data.test))  # type: ignore[return-value]


def train_arm(name: str, seed: int, seconds: float, train: Tensor, test: Tensor) -> dict[str, Any]:
    """Train for some CPU seconds and measure the averaged weights."""
    torch.manual_seed(seed)
    make, optimizer_of = ARMS[name]
    model = make()
    optimizer = optimizer_of(model)
    peak = optimizer.param_groups[0]["lr"]
    average = copy.deepcopy(model)
    begun, step, skipped = time.process_time(), 0, 0
    while (spent := (time.process_time() - begun) / seconds) < 1.0:
        factor = min(1.0, (step + 1) / 100, 2.5 * (1.0 - spent))
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        rows = torch.from_numpy(Stream(seed, "batch", step).integers(0, BATCH, len(train)))
        x = dequantise(train[rows], torch.rand(BATCH, *SHAPE), 256)
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
        "arm": name, "seed": seed, "seconds": seconds, "steps": step, "skipped": skipped,
        "parameters": sum(p.numel() for p in model.parameters()), "bits_per_dim": test_bits(average.eval(), test),
    }  # fmt: skip


@torch.no_grad()
def test_bits(model: nn.Module, test: Tensor) -> float:
    """Mean bits per dimension of test images, noise by image number; the same for every model."""
    total = 0.0
    for first in range(0, len(test), 100):
        part = test[first : first + 100]
        uniform = Stream(0, "test noise").uniform(first * DIMS, part.numel())
        x = dequantise(part, torch.from_numpy(uniform).float().view(part.shape), 256)
        total += float(bits(model.log_prob(x), DIMS, 256).double().sum())
    return total / len(test)


def run() -> dict[str, Any]:
    seconds = float(os.environ.get("QUINTIC_STUDY_SECONDS", "240"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    train, test = images()
    rows = []
    with one_thread():
        for seed in SEEDS:
            for name in ARMS:
                path = FOLDER / f"{name.replace(' ', '_').replace(',', '')}-{seconds:g}-{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(train_arm(name, seed, seconds, train, test[:TEST_IMAGES])))
                rows.append(json.loads(path.read_text()))
                print(rows[-1], flush=True)
        return {"machine": describe(torch.device("cpu"), torch.float32), "seconds": seconds, "rows": rows}


def _values(result: dict[str, Any], arm: str) -> list[float]:
    return [row["bits_per_dim"] for row in result["rows"] if row["arm"] == arm]


def _half_width(values: list[float]) -> float:
    """Half of a 95 % interval of the mean of three."""
    return 4.303 * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def claims(result: dict[str, Any]) -> list[Claim]:
    ours = _values(result, "TARFLOW, Muon")
    found = []
    for arm in ARMS:
        if arm == "TARFLOW, Muon":
            continue
        differences = [a - b for a, b in zip(ours, _values(result, arm), strict=True)]
        mean, half = float(np.mean(differences)), _half_width(differences)
        found.append(Claim(
            f"TARFLOW with Muon has fewer bits per dimension than {arm}, at equal CPU time", "quintic",
            f"{mean:+.3f} \u00b1 {half:.3f}", len(ours), holds(mean, half), "tarflow_likelihood",
        ))  # fmt: skip
    return found


def section(result: dict[str, Any]) -> str:
    m = result["machine"]
    rows = []
    for arm in ARMS:
        chosen = [row for row in result["rows"] if row["arm"] == arm]
        values = [row["bits_per_dim"] for row in chosen]
        rows.append([
            arm, f"{chosen[0]['parameters']:,}", f"{chosen[0]['steps']:,}",
            f"{np.mean(values):.3f} \u00b1 {_half_width(values):.3f}", f"{sum(row['skipped'] for row in chosen)}",
        ])  # fmt: skip
    head = ("model", "parameters", "steps", "test bits per dimension", "steps left out: not finite")
    return "\n".join([
        "## TARFLOW: likelihood of Fashion-MNIST",
        "",
        f"`python -m benchmarks tarflow_likelihood`. {result['seconds']:g} CPU seconds of training each, one thread, "
        f"batch {BATCH},",
        "uniform dequantisation and, but for one arm, logits; averaged weights; mean over seeds with half of a 95 %",
        f"interval. {m['cpu']}, torch {m['torch']}.",
        "",
        table(head, rows),
    ])  # fmt: skip
