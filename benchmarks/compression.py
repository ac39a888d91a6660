"""Trained networks made smaller without training: what is lost at which size, and by which part of the method.

A small network on scikit-learn's digits, and the demo's language model (laptop preset on Moby Dick; the demo's runs are
taken, and trained if they are not there). Everything is fitted to training data and measured on data kept out. All
methods are given the same number of parameters: whole neurons, ranks in compact form (r (m + n - r) numbers), or single
weights, of which only the number is counted and not where they are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import demo
from benchmarks.claims import Claim, holds, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import one_thread, paired, plus_minus, spread
from quintic.cli.wiring import build_task, load_run_model
from quintic.core.counter_rng import Stream
from quintic.core.machine import describe
from quintic.lm.task import LanguageModelTask
from quintic.lowrank import compress
from quintic.moe.activation import ACTIVATIONS
from quintic.moe.experts import Experts
from quintic.moe.feedforward import FeedForward

METHODS: dict[str, dict[str, Any]] = {
    "neurons by ID": {},
    "by ID, next layer as it was": {"correct": False},
    "neurons by chance": {"rule": "uniform"},
    "neurons by weight norms": {"rule": "weight-norms", "correct": False},
    "ranks by SVD of outputs": {"method": "svd"},
    "ranks by ID of outputs": {"method": "id"},
    "ranks by CUR": {"method": "cur"},
    "ranks by SVD of weights": {"method": "svd-plain"},
    "largest weights": {"method": "magnitude"},
}
"""Arguments of ``compress``. Neurons by chance are corrected, those by weight norms are not: pruning as it is known."""
PLOTTED = (
    "neurons by ID", "by ID, next layer as it was", "neurons by chance", "neurons by weight norms",
    "ranks by SVD of outputs", "ranks by ID of outputs", "largest weights",
)  # fmt: skip
DIGIT_SEEDS = (0, 1, 2, 3, 4)
DIGIT_WIDTHS = (64, 256, 128, 10)
DIGIT_SIZES = (0.5, 0.25, 0.12, 0.06)
MODEL_SEEDS = (0, 1, 2)
MODEL_SIZES = (0.75, 0.5, 0.25)
CALIBRATION = 16_384
"""Tokens of training text."""
RECOVERY = Path("runs") / "benchmarks" / "compression"
"""Kept; delete it to measure again."""


# Digits


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; every seed keeps out another fifth."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.argsort(Stream(seed, "digits").uniform(0, len(data.target)))
    x = torch.from_numpy(data.data[order] / 16).float()
    y = torch.from_numpy(data.target[order])
    cut = len(y) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]


def train_digits(seed: int, widths: Sequence[int], epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    x, y, *_ = digits(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(epochs):
        for at in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
    return net


def count(widths: Sequence[int]) -> int:
    return sum(d_out * (d_in + 1) for d_in, d_out in pairwise(widths))


def neurons_for(widths: Sequence[int], size: float) -> float:
    """The share of the neurons of all hidden layers that leaves a share of the parameters."""
    shares = np.arange(1000, 0, -1) / 1000
    for share in shares:
        fewer = [widths[0], *(max(1, round(share * f)) for f in widths[1:-1]), widths[-1]]
        if count(fewer) <= size * count(widths):
            return float(share)
    return float(shares[-1])


def weights_for(widths: Sequence[int], size: float) -> float:
    """The share of the weights of all matrices but the last that does the same; ten outputs have no rank to lose."""
    head = widths[-1] * (widths[-2] + 1)
    constants = sum(widths[1:-1])
    return max(1e-6, (size * count(widths) - head - constants) / (count(widths) - head - constants))


@torch.no_grad()
def digit_scores(net: nn.Module, seed: int) -> dict[str, float]:
    *_, x, y = digits(seed)
    logits = net(x)
    return {"loss": float(F.cross_entropy(logits, y)), "right": float((logits.argmax(1) == y).float().mean())}


def digit_rows(seed: int, widths: Sequence[int], sizes: Sequence[float], epochs: int) -> list[dict[str, Any]]:
    net = train_digits(seed, widths, epochs)
    rows = [{"method": "whole", "size": 1.0, "seed": seed, **digit_scores(net, seed)}]
    for size in sizes:
        for method, options in METHODS.items():
            if "method" in options:
                keep, layers = weights_for(widths, size), [str(2 * i) for i in range(len(widths) - 2)]
            else:
                keep, layers = neurons_for(widths, size), None
            made = compress(net, [digits(seed)[0]], keep=keep, layers=layers, seed=seed, **options)
            real = made.parameters_after / made.parameters_before
            rows.append({"method": method, "size": size, "real": real, "seed": seed, **digit_scores(made.module, seed)})
    return rows


# A language model


class OpenFeedForward(nn.Module):
    """A gated feed-forward with its two matrices as linear layers, which can be given ranks."""

    def __init__(self, w_in: Tensor, down: Tensor, activation: str) -> None:
        super().__init__()
        self.gate_up = nn.Linear(w_in.shape[1], w_in.shape[0], bias=False)
        self.down = nn.Linear(down.shape[1], down.shape[0], bias=False)
        self.gate_up.weight.data, self.down.weight.data = w_in.detach().clone(), down.detach().clone()
        self.function = ACTIVATIONS[activation].function

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.function(gate) * up)


class OpenExperts(nn.Module):
    """A stack of experts, one by one."""

    def __init__(self, stack: Experts) -> None:
        super().__init__()
        parts = zip(stack.gate_up, stack.down, strict=True)  # type: ignore[arg-type]
        self.each = nn.ModuleList(OpenFeedForward(w_in, down, stack.activation) for w_in, down in parts)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.each):
            rows, places = (ids == number).nonzero(as_tuple=True)
            y.index_add_(0, rows, gates[rows, places, None] * expert(x[rows]))
        return y


def opened(model: nn.Module) -> nn.Module:
    """The same model with linear layers in place of fused and stacked ones; changes it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, OpenExperts(module))
        elif isinstance(module, FeedForward):
            w_in = module.get_parameter(module.in_name)
            model.set_submodule(name, OpenFeedForward(w_in, module.down, module.activation))
    return model


def trained(seed: int, folder: Path, settings: Sequence[str]) -> Path:
    run = folder / f"seed-{seed}"
    if not (run / "report.html").exists():  # written at the end of the training
        demo.quintic("train", *settings, "--seed", str(seed), "--out", str(run))
    return run


def model_rows(run: Path, seed: int, sizes: Sequence[float], tokens: int) -> list[dict[str, Any]]:
    loaded = load_run_model(run, "best", "cpu", "float32")
    task, _, _ = build_task("lm", [Path(path) for path in loaded.header["paths"]], loaded.settings)
    assert isinstance(task, LanguageModelTask)
    windows = math.ceil(tokens / task.config.context)
    numbers = np.argsort(Stream(seed, "calibration").uniform(0, task.num_examples))[:windows]
    batches = [task.batch(part) for part in np.array_split(numbers, math.ceil(windows / 16))]

    def bits(model: nn.Module) -> float:
        return (task.evaluate(model, "validation") or {})["val_bits_per_byte"]

    rows = [{"method": "whole", "size": 1.0, "seed": seed, "loss": bits(loaded.model)}]
    whole = loaded.model
    apart = opened(load_run_model(run, "best", "cpu", "float32").model)
    assert abs(bits(apart) - rows[0]["loss"]) < 1e-4
    for size in sizes:
        for method, options in METHODS.items():
            # Of the feed-forwards only: neither attention nor the embedding changes.
            start, layers = (apart, ["blocks.*.ffn*"]) if "method" in options else (whole, None)
            made = compress(start, batches, keep=size, layers=layers, forward=task.loss, seed=seed, **options)
            before, after = (sum(getattr(r, f"parameters_{w}") for r in made.layers) for w in ("before", "after"))
            rows.append({
                "method": method, "size": size, "real": after / before, "seed": seed, "loss": bits(made.module),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def recovery(run: Path, folder: Path, settings: Sequence[str], steps: int) -> dict[str, Any]:
    """Half of the neurons by the command line, and some further training."""
    half, tuned = folder / "half", folder / "half-tuned"
    if not (tuned / "report.html").exists():
        for path in (half, tuned):
            shutil.rmtree(path, ignore_errors=True)
        demo.quintic("matrix", "compress", str(run), "--keep", "0.5", "--out", str(half))
        start = ("--from", str(half), "--out", str(tuned))
        demo.quintic("train", *settings, *start, "optim.lr=0.004", f"engine.steps={steps}")
    whole, cut = json.loads((half / "run.json").read_text())["val_bits_per_byte"]
    last = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    return {"whole": whole, "cut": cut, "after": last["val_bits_per_byte"], "steps": steps}


@one_thread()
def run(
    digit_seeds: Sequence[int] = DIGIT_SEEDS,
    model_seeds: Sequence[int] = MODEL_SEEDS,
    epochs: int = 40,
    settings: Sequence[str] = ("--size", "laptop"),
    folder: Path = demo.FOLDER,
    sizes: tuple[Sequence[float], Sequence[float]] = (DIGIT_SIZES, MODEL_SIZES),
    tokens: int = CALIBRATION,
    recovery_folder: Path = RECOVERY,
    steps: int = 100,
) -> dict:
    found: dict[str, list[dict[str, Any]]] = {"digits": [], "model": []}
    for seed in digit_seeds:
        found["digits"] += digit_rows(seed, DIGIT_WIDTHS, sizes[0], epochs)
    for seed in model_seeds:
        found["model"] += model_rows(trained(seed, folder, settings), seed, sizes[1], tokens)
    again = recovery(trained(model_seeds[0], folder, settings), recovery_folder, settings, steps)
    machine = describe(torch.device("cpu"), torch.float32)
    facts = {"machine": machine, "seeds": list(digit_seeds), "widths": list(DIGIT_WIDTHS), "tokens": tokens}
    return {**facts, **found, "recovery": again}


def values(rows: list[dict[str, Any]], method: str, size: float, what: str = "loss") -> list[float]:
    return [row[what] for row in rows if row["method"] == method and row["size"] == size]


def sizes_of(rows: list[dict[str, Any]]) -> list[float]:
    return sorted({row["size"] for row in rows if row["method"] != "whole"}, reverse=True)


def _table(rows: list[dict[str, Any]], what: str, words: Any) -> str:
    sizes = sizes_of(rows)
    head = ("", *(f"{size:.0%}" for size in sizes))
    return table(head, [(name, *(words(spread(values(rows, name, size, what))) for size in sizes)) for name in METHODS])


def section(result: dict) -> str:
    digit_rows, rows = result["digits"], result["model"]
    whole = spread(values(digit_rows, "whole", 1.0, "right"))
    best = spread(values(rows, "whole", 1.0))
    n = [len(values(each, "whole", 1.0)) for each in (digit_rows, rows)]
    return "\n\n".join([
        "## Trained networks made smaller by skeletons",
        "`python -m benchmarks compression`. No training after the cut; methods at equal numbers of parameters. "
        '"Neurons by ID" keeps neurons\nwhose activations give the others, and fits the next layer to them; "as it '
        'was" leaves out that fit; "by chance" has the fit but\nno choice. Ranks are of single matrices, fitted to '
        "their outputs or to the weights.",
        f"Digits, {'-'.join(map(str, result['widths']))}, {n[0]} seeds; whole: {whole['mean']:.1%} of the test images "
        "right. Share right by parameters kept:",
        _table(digit_rows, "right", lambda f: f"{f['mean']:.1%} ± {f['half']:.1%}"),
        f"Language model of the demo, {n[1]} seeds, fitted to {result['tokens']:,} tokens of training text; whole: "
        f"{plus_minus(best)} bits per byte\non validation text. Bits per byte by parameters of feed-forward networks "
        "and experts kept:",
        _table(rows, "loss", plus_minus),
        "`quintic matrix compress --keep 0.5` and {steps} further steps by `quintic train --from`: {whole:.3f} bits "
        "per byte whole, {cut:.3f}\ncut, {after:.3f} after (one seed).".format(**result["recovery"]),
        'The "largest weights" stay where they are in a matrix of full shape: only their number is smaller, and the '
        "places of the zeros are not\ncounted. All other rows are dense matrices of smaller shapes.",
        image("compression-digits", "Digits: loss against size"),
        image("compression-model", "Language model: bits per byte against size"),
    ])  # fmt: skip


def _lines(rows: list[dict[str, Any]]) -> list[Line]:
    sizes = sizes_of(rows)[::-1]
    lines = []
    for name in PLOTTED:
        found = [spread(values(rows, name, size)) for size in sizes]
        lines.append(Line(name, sizes, [f["mean"] for f in found], [f["half"] for f in found]))
    return lines


def plots(result: dict) -> dict[str, str]:
    drawn = {}
    for name, title, y in (
        ("digits", "Digits: loss on test images against size", "cross-entropy, nats"),
        ("model", "Language model: validation text against size", "bits per byte"),
    ):
        rows = result[name]
        whole = {"whole": spread(values(rows, "whole", 1.0))["mean"]}
        x = "part of the parameters kept" + (" of the feed-forward networks" if name == "model" else "")
        log = name == "digits"
        drawn[f"compression-{name}"] = draw(title, _lines(rows), x=x, y=y, log_x=True, log_y=log, rules=whole)
    return drawn


def claims(result: dict) -> list[Claim]:
    rows = result["model"]
    n = len(values(rows, "whole", 1.0))
    base = values(rows, "neurons by ID", 0.5)
    fit = paired(base, values(rows, "by ID, next layer as it was", 0.5))
    choice = paired(base, values(rows, "neurons by chance", 0.5))
    source, words = "Chee et al., NeurIPS 2022", " bits per byte, half of the neurons"
    return [
        Claim("Fitting the next layer to the neurons kept lowers the loss", source, plus_minus(fit) + words, n,
              holds(fit["mean"], fit["half"]), "compression"),
        Claim("Neurons chosen by ID lose less than neurons by chance, both fitted", source, plus_minus(choice) + words,
              n, holds(choice["mean"], choice["half"]), "compression"),
    ]  # fmt: skip
