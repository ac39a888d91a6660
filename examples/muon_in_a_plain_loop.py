"""Muon in a training loop of your own, beside AdamW.

A small network learns to name ten drawn shapes, once with AdamW and once with Muon, each at the best of the same five
learning rates. One sees which parameters Muon takes (the matrices; AdamW keeps the biases and the last layer), and
after how many of the steps Muon is as far as AdamW at its end. Nothing in the loop knows which optimizer it has.

    python examples/muon_in_a_plain_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintic import Muon, clip_grad_norm_, declare, roles
from quintic.data.drawings import SHAPES, draw

RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
BATCH = 100


@cache
def pictures(count: int, label: str) -> tuple[Tensor, Tensor]:
    """Pixels (count, 256) about 0, and which of the shapes it is."""
    images, shapes = draw(count, 16, 1, seed=0, label=label)
    return torch.from_numpy(images).flatten(1).float() / 127.5 - 1.0, torch.from_numpy(shapes)


def network() -> nn.Module:
    """Always the same initial weights."""
    torch.manual_seed(0)
    layers = nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, len(SHAPES))
    model = nn.Sequential(*layers)
    # A plain Linear is taken for a hidden matrix: what is the output layer has to be said.
    declare(model, "4.weight", "head")
    return model


def train(
    make: Callable[[nn.Module, float], torch.optim.Optimizer], lr: float, steps: int
) -> tuple[list[float], float]:
    """Validation losses, one every tenth of the steps, and the share of shapes named rightly at the end."""
    model = network()
    optimizer = make(model, lr)
    x, y = pictures(BATCH * 60, "train")
    held_x, held_y = pictures(500, "validation")
    losses, right = [], 0.0
    for step in range(steps):
        part = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        clip_grad_norm_(model)
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            with torch.no_grad():
                found = model(held_x)
            losses.append(F.cross_entropy(found, held_y).item())
            right = (found.argmax(1) == held_y).float().mean().item()
    return losses, right


def main(argv: list[str] | None = None) -> None:
    """Sweep both optimizers and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(argv).steps
    print(roles(network()))
    made: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
        "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        "Muon": lambda model, lr: Muon(model, lr=lr, weight_decay=0.1),
    }
    best = {}
    for name, make in made.items():
        runs = {lr: train(make, lr, steps) for lr in RATES}
        lr = min(runs, key=lambda lr: runs[lr][0][-1])
        best[name], right = runs[lr]
        print(f"{name:5}  best rate {lr:g}, validation loss {best[name][-1]:.3f}, {right:.0%} named rightly")
    ahead = next((i for i, loss in enumerate(best["Muon"], 1) if loss <= best["AdamW"][-1]), None)
    if ahead is None:
        print("Muon does not reach AdamW's loss here")
    else:
        print(f"Muon reaches AdamW's final loss after {ahead * 10} % of the steps")


if __name__ == "__main__":
    main()
