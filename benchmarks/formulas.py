"""What the posts state in formulas, checked by numbers: no training but that of a small dense language model.

The accuracy table of the matrix sign, the bound on norms under weight decay, which pieces of a feed-forward are worth
keeping, assignment and codebooks by a bias, and what the rules of DDCM carry as the codebook grows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from docs.figures.ddcm import carried
from docs.figures.moe_geometry import random_split
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.claims import Claim, table
from benchmarks.study import plus_minus, spread
from quintic.cli.wiring import build_task, load_run_model
from quintic.core.machine import describe
from quintic.linalg import fitted_coefficients
from quintic.linalg.coefficients import gaussian_spectrum
from quintic.lm import LanguageModel
from quintic.moe import LossFree, balanced_assign, split_dense
from quintic.optim import Muon

KELLER = (3.4445, -4.7750, 2.0315)
TABLE = (
    (1024, 1024, 3, (4.328, -9.666, 7.020), 0.10257, 0.18278),
    (2048, 1024, 3, (4.095, -9.327, 7.028), 0.01628, 0.06171),
    (4096, 1024, 3, (3.886, -8.956, 6.948), 0.00371, 0.02574),
    (2048, 2048, 3, (4.857, -13.103, 11.130), 0.10739, 0.24410),
    (4096, 4096, 3, (5.460, -17.929, 18.017), 0.11303, 0.33404),
    (8192, 8192, 3, (6.139, -24.893, 30.147), 0.11944, 0.44843),
    (1024, 1024, 5, (3.297, -4.136, 1.724), 0.02733, 0.04431),
    (2048, 1024, 5, (2.644, -3.128, 1.476), 0.00038, 0.02954),
    (4096, 1024, 5, (2.461, -2.663, 1.214), 0.00008, 0.02563),
    (2048, 2048, 5, (3.333, -4.259, 1.779), 0.03516, 0.04991),
    (4096, 4096, 5, (3.373, -4.613, 2.057), 0.04700, 0.06372),
    (8192, 8192, 5, (3.389, -4.902, 2.310), 0.05869, 0.07606),
)
"""Of post 10592: rows, columns, steps, its triple, the mean square error of that, and of Keller's."""
SEEDS = (0, 1, 2, 3, 4)
EXPERTS, KEPT = 16, (1, 2, 4, 8)
RULES = ("best", "norm", "router", "random")
SIZES = (64, 1024, 16384)
STEPS = 300
"""Of the dense language model."""


def sign_error(triple: tuple[float, float, float], steps: int, sigma: NDArray[np.float64]) -> float:
    """Mean of (p(...p(sigma)) - 1)^2 over singular values."""
    a, b, c = triple
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return float(np.mean((sigma - 1) ** 2))


def sign_accuracy() -> list[dict[str, Any]]:
    """The table of post 10592, computed again without random matrices, beside triples fitted here."""
    rows = []
    for m, n, steps, triple, own, keller in TABLE:
        sigma = gaussian_spectrum(m, n)
        rows.append({
            "shape": [m, n], "steps": steps, "post": own, "post_keller": keller,
            "measured": sign_error(triple, steps, sigma), "keller": sign_error(KELLER, steps, sigma),
            "fitted": sign_error(fitted_coefficients(m, n, steps)[0], steps, sigma),
        })  # fmt: skip
    return rows


def norm_over_bound(decay: float, scale: float, seed: int, steps: int = 600) -> float:
    """Largest ||W|| / max(||W_0||, s / lambda) over steps of Muon along one direction and noise, exact signs."""
    generator = torch.Generator().manual_seed(seed)
    start = scale * torch.randn(24, 16, generator=generator, dtype=torch.float64)
    weight, mean = nn.Parameter(start.clone()), torch.randn(24, 16, generator=generator, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, weight_decay=decay, scale="none", method="svd")
    bound = max(float(torch.linalg.matrix_norm(start, 2)), 1.0 / decay)
    worst = 0.0
    for step in range(steps):
        noise = torch.randn(24, 16, generator=generator, dtype=torch.float64)
        weight.grad = mean + (0.0 if step < steps // 2 else 3.0) * noise
        optimizer.step()
        worst = max(worst, float(torch.linalg.matrix_norm(weight.detach(), 2)))
    return worst / bound


def trained_split(steps: int = STEPS, size: str = "tiny") -> list[dict[str, list[float]]]:
    """Errors of every feed-forward of a dense language model that ``quintic train`` has trained, on its own text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "quintic", "train", "--size", size, "--out", str(out), "lm.dense=true",
            f"engine.steps={steps}", "engine.eval_every=0", "engine.sample_every=0",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        loaded = load_run_model(out, "last", "cpu", "float32")
        task = build_task("lm", [], loaded.settings)[0]
    model = cast("LanguageModel", loaded.model)
    inputs: dict[int, Tensor] = {}
    layers = [cast("nn.Module", cast("Any", block).ffn) for block in model.blocks]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, given, i=i: inputs.__setitem__(i, given[0].detach()))
    with torch.no_grad():
        task.loss(model, task.batch(np.arange(16)))
    return [split_dense(layer, EXPERTS, inputs[i]).errors for i, layer in enumerate(layers)]


def assignment(size: int, seed: int) -> float:
    """Cost of a balanced assignment over that of the Hungarian method, less 1."""
    costs = np.random.default_rng(seed).random((size, size))
    rows, columns = linear_sum_assignment(costs)
    return balanced_assign(costs).cost / float(costs[rows, columns].sum()) - 1.0


def codes_used(balanced: bool, seed: int, codes: int = 8, steps: int = 400) -> tuple[int, float]:
    """Codes in use and mean squared error of a codebook of as many codes as the data has clusters (variance 0.005)."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(codes) * 2 * torch.pi / codes
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    data = centres.repeat(100, 1) + 0.05 * torch.randn(100 * codes, 2, generator=generator)
    book = 0.1 * torch.randn(codes, 2, generator=generator) + torch.arange(codes).unsqueeze(1)
    rule, bias = LossFree("relative", rate=0.3), torch.zeros(codes)
    for _ in range(steps):
        choice = (bias - torch.cdist(data, book).square()).argmax(1)
        counts = torch.bincount(choice, minlength=codes)
        for j in counts.nonzero().flatten():
            book[j] += 0.2 * (data[choice == j].mean(0) - book[j])
        if balanced:
            rule.step(bias, counts, top_k=1)
    nearest = torch.cdist(data, book).min(1)
    return len(nearest.indices.unique()), float(nearest.values.square().mean())


def run() -> dict[str, Any]:
    split = random_split(experts=EXPERTS).errors
    return {
        "machine": describe(torch.device("cpu"), torch.float32),
        "sign": sign_accuracy(),
        "norm": [
            norm_over_bound(decay, start, seed)
            for decay in (0.05, 0.5) for start in (0.01, 3.0) for seed in SEEDS
        ],
        "pieces": {"random network": [split], "trained language model": trained_split()},
        "assignment": {str(n): [assignment(n, seed) for seed in SEEDS] for n in (16, 64, 128)},
        "codes": {str(balanced): [codes_used(balanced, seed) for seed in SEEDS] for balanced in (False, True)},
        "carried": {rule: [carried(k, rule) for k in SIZES] for rule in ("argmax", "softmax", "literal")},
    }  # fmt: skip


def gained(errors: list[dict[str, list[float]]], k: int, rule: str) -> float:
    """Of what the best subset of k gains over chance, the share that a rule gains; mean over layers."""
    return float(np.mean([(e["random"][k] - e[rule][k]) / (e["random"][k] - e["best"][k]) for e in errors]))


def section(result: dict[str, Any]) -> str:
    rows = [
        (f"{r['shape'][0]} x {r['shape'][1]}", str(r["steps"]), *(f"{r[name]:.5f}" for name in
         ("post", "measured", "fitted", "post_keller", "keller")))
        for r in result["sign"]
    ]  # fmt: skip
    head = ("shape", "steps", "post's triple, post", "measured", "fitted here", "Keller's triple, post", "measured")
    pieces = [
        (name, str(k), *(f"{np.mean([e[rule][k] for e in errors]):.3f}" for rule in RULES),
         f"{gained(errors, k, 'norm'):.0%}", f"{gained(errors, k, 'router'):.0%}")
        for name, errors in result["pieces"].items() for k in KEPT
    ]  # fmt: skip
    kept = (
        "network",
        "k of 16",
        "best subset",
        "true norms",
        "predicted norms",
        "chance",
        "norms gain",
        "predicted gain",
    )
    shares = [
        (rule, *(f"{mean:.3f} \u00b1 {half:.3f}" for mean, half in values))
        for rule, values in result["carried"].items()
    ]
    return "\n\n".join([
        "## Formulas of the posts",
        "`python -m benchmarks formulas`. Mean square error of the singular values of the matrix sign on Gaussian "
        "matrices (post 10592),\nby quantiles of the law that they follow instead of random matrices:",
        table(head, rows),
        "Squared error over squared norm when k of 16 pieces of a feed-forward are kept (post 10699), and the share of "
        f"what the best\nsubset gains over chance; a random network, and a dense language model after {STEPS} "
        "steps, on its text:",
        table(kept, pieces),
        "Share of the wanted shift that the chosen noise carries in 8 dimensions (post 10711), by the size of the "
        "codebook; the true\nreverse step has 1:",
        table(("rule", *(f"K = {k:,}" for k in SIZES)), shares),
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    def claim(text: str, source: str, measured: str, seeds: int, ok: bool) -> Claim:
        return Claim(text, source, measured, seeds, "yes" if ok else "no", "formulas")

    sign = result["sign"]
    off = max(max(abs(r["measured"] - r["post"]), abs(r["keller"] - r["post_keller"])) for r in sign)
    better = [r["fitted"] / r["post"] for r in sign if r["steps"] == 3]
    five = [r["post"] / r["post_keller"] for r in sign if r["steps"] == 5]
    norm, pieces = max(result["norm"]), result["pieces"]
    gains = {name: [gained(errors, k, "norm") for k in KEPT] for name, errors in pieces.items()}
    excess = max(max(found) for found in result["assignment"].values())
    used = {balanced: [count for count, _ in found] for balanced, found in result["codes"].items()}
    carried = result["carried"]
    arg, soft, literal = (carried[rule][-1] for rule in ("argmax", "softmax", "literal"))
    made = [
        claim("Errors of the matrix sign by shape and steps: the whole table", "post 10592",
              f"24 numbers, at most {off:.5f} off", 0, off <= 3e-4),
        claim("A triple fitted to the shape is better than Keller's", "post 10592",
              f"5 steps: {min(five):.3f} to {max(five):.3f} of its error", 0, max(five) < 1),
        claim("The post's triples of 3 steps are the best", "post 10592",
              f"without its condition on roots: {min(better):.2f} to {max(better):.2f} of their error", 0,
              min(better) > 0.99),
        claim("Under Frobenius decay no spectral norm exceeds the larger of its start and s / lambda", "post 10739",
              f"at most {norm:.4f} of it", len(SEEDS), norm <= 1 + 1e-6),
    ]  # fmt: skip
    for name, found in gains.items():
        made.append(claim(
            f"The pieces of largest norm are the ones to keep: most of what the best subset gains; {name}",
            "post 10699", f"{min(found):.0%} to {max(found):.0%} of it at k of {', '.join(map(str, KEPT))}", 0,
            min(found) > 0.5,
        ))  # fmt: skip
    made += [
        claim("Assignment under capacities by the bias of a balancer is optimal", "post 10757",
              f"at most {excess:.0g} above the Hungarian method, 16 to 128 items", len(SEEDS), excess <= 1e-9),
        claim("The same bias cures the collapse of a codebook", "post 10757",
              f"{plus_minus(spread(used['False']))} codes of 8 in use without, {plus_minus(spread(used['True']))} with",
              len(SEEDS), min(used["True"]) == 8),
        claim("A softmax of inner products tends to DDPM as K grows, argmax does not", "post 10711",
              f"shift carried at K = {SIZES[-1]:,}: {soft[0]:.3f} \u00b1 {soft[1]:.3f}, argmax {arg[0]:.3f}", 0,
              abs(soft[0] - 1) <= max(0.02, soft[1]) and arg[0] > 1.1),
        claim("Weights by the distance, as written in the post, tend to DDPM", "post 10711",
              f"shift carried at K = {SIZES[-1]:,}: {literal[0]:.3f} \u00b1 {literal[1]:.3f}", 0,
              abs(literal[0] - 1) <= max(0.02, literal[1])),
    ]  # fmt: skip
    return made
