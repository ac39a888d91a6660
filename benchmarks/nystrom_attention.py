"""Attention through landmarks: how near to exact attention, and from which length on it is quicker.

Error on queries and keys of two kinds: of a trained model (MiniLM over a page of Moby Dick, every layer and head), and
random ones that change slowly along the sequence: with our ridge (the default, and one for rough sequences), with the
true pseudo-inverse, with the peers' six steps of an iteration scaled by the batch's maximum, and beside them attention
that gives every query the mean of the values. Needs the extra ``bench`` and ``python -m benchmarks.fetch_data minilm``.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import Claim, table
from benchmarks.fetch_data import fetch
from benchmarks.plot import Line, draw, image
from benchmarks.study import one_thread
from quintic.assets import corpus_path
from quintic.core.machine import describe
from quintic.lowrank import nystrom_attention
from quintic.lowrank.attention import _inverse, _segment_means

LANDMARKS = (16, 32, 64, 128)
CONTESTANTS = ("ridge 0.01", "ridge 0.03", "pseudo-inverse", "six steps", "mean of the values")
LENGTHS = (512, 1024, 2048, 4096, 8192)
ROUNDS = 5


@torch.no_grad()
def heads_of_a_model() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values (heads, 512, 32) of every layer on the first page of the corpus."""
    import transformers

    folder = str(fetch("minilm"))
    model: Any = transformers.AutoModel.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    text = corpus_path().read_text(encoding="utf-8")[30_000:40_000]
    batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    states = model.eval()(**batch, output_hidden_states=True).hidden_states
    for layer, x in zip(model.encoder.layer, states, strict=False):
        own = layer.attention.self
        q, k, v = (
            part(x)[0].view(x.shape[1], own.num_attention_heads, -1).transpose(0, 1)
            for part in (own.query, own.key, own.value)
        )
        found.append((q, k, v))
    return found


def slow_heads() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random walks around zero, correlated over some 30 tokens, (12, 512, 32)."""
    generator, smooth = torch.Generator().manual_seed(0), 0.97
    steps = torch.randn(3, 12, 512, 32, generator=generator)
    x = [steps[..., 0, :]]
    for i in range(1, 512):
        x.append(smooth * x[-1] + (1 - smooth**2) ** 0.5 * steps[..., i, :])
    q, k, v = torch.stack(x, dim=-2)
    return [(q, k, v)]


def errors(heads: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Relative errors of the output by contestant, and the largest |AZA - A| / |A| of the true pseudo-inverse."""
    found: dict[str, dict[str, float]] = {}
    for m in LANDMARKS:
        wrong: dict[str, float] = dict.fromkeys(CONTESTANTS, 0.0)
        whole, residual = 0.0, 0.0
        for q, k, v in heads:
            exact = F.scaled_dot_product_attention(q, k, v)
            whole += float(exact.square().sum())
            first, last = (_segment_means(x, m, None) for x in (q * q.shape[-1] ** -0.5, k))
            A = torch.softmax(first @ last.mT, -1)
            nearby = {
                "ridge 0.01": nystrom_attention(q, k, v, m, ridge=0.01),
                "ridge 0.03": nystrom_attention(q, k, v, m, ridge=0.03),
                "pseudo-inverse": nystrom_attention(q, k, v, m, ridge=0.0),
                "six steps": torch.softmax(q @ last.mT * q.shape[-1] ** -0.5, -1)
                @ (_six_steps(A) @ (torch.softmax(first @ k.mT, -1) @ v)),
                "mean of the values": v.mean(-2, keepdim=True).expand_as(v),
            }
            for name, output in nearby.items():
                wrong[name] += float((output - exact).square().sum())
            residual = max(residual, _residual(A.double(), _inverse(A, 0.0)))
        found[str(m)] = {**{name: (value / whole) ** 0.5 for name, value in wrong.items()}, "residual": residual}
    return found


def _residual(A: Tensor, Z: Tensor) -> float:
    return float(((A @ Z @ A - A).flatten(1).norm(dim=1) / A.flatten(1).norm(dim=1)).max())


def _six_steps(A: Tensor) -> Tensor:
    """Z <- Z (13 - AZ (15 - AZ (7 - AZ))) / 4 from A' over the batch's largest row and column sums."""
    eye = torch.eye(A.shape[-1])
    Z = A.mT / (A.abs().sum(-1).max() * A.abs().sum(-2).max())
    for _ in range(6):
        AZ = A @ Z
        Z = Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ))) / 4
    return Z


def times(landmarks: int = 64) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of 8 heads of width 64, smallest of some rounds in turns."""
    found: dict[str, dict[str, float]] = {}
    for n in LENGTHS:
        q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0))
        contestants = {
            "exact": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "landmarks": lambda q=q, k=k, v=v: nystrom_attention(q, k, v, landmarks),
        }
        spent: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, attend in contestants.items():
                began = time.perf_counter()
                attend()
                spent[name].append(1e3 * (time.perf_counter() - began))
        found[str(n)] = {name: min(values) for name, values in spent.items()}
    return found


def run() -> dict[str, Any]:
    with one_thread(), torch.no_grad():
        return {
            "machine": describe(torch.device("cpu"), torch.float32),
            "errors": {"MiniLM": errors(heads_of_a_model()), "slow walks": errors(slow_heads())},
            "times": times(),
        }


def section(result: dict[str, Any]) -> str:
    rows = [
        (kind, m, *(f"{row[name]:.1%}" for name in CONTESTANTS), f"{row['residual']:.1e}")
        for kind, found in result["errors"].items() for m, row in found.items()
    ]  # fmt: skip
    times = [
        (f"{int(n):,}", f"{row['exact']:.1f}", f"{row['landmarks']:.1f}", f"{row['exact'] / row['landmarks']:.1f}")
        for n, row in result["times"].items()
    ]
    return "\n\n".join([
        "## Attention through landmarks",
        "`python -m benchmarks nystrom_attention`: 512 tokens, relative error of the output over all heads by the "
        "inverse among the landmarks\n(ridge 0.01: the default; six steps: the usual iteration), and the worst "
        "residual |AZA - A| / |A| of the pseudo-inverse.",
        table(("queries and keys", "landmarks", *CONTESTANTS, "residual"), rows),
        "Eight heads of width 64, 64 landmarks, float32, one thread, milliseconds:",
        table(("tokens", "exact", "landmarks", "exact / landmarks"), times),
        image("nystrom-attention", "Time of attention by the length"),
    ])  # fmt: skip


def plots(result: dict[str, Any]) -> dict[str, str]:
    rows = result["times"]
    return {
        "nystrom-attention": draw(
            "Forward pass of attention, 8 heads of width 64",
            [Line(name, [int(n) for n in rows], [r[name] for r in rows.values()]) for name in ("exact", "landmarks")],
            x="tokens", y="milliseconds", log_x=True, log_y=True,
        )
    }  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    worst = max(row["residual"] for found in result["errors"].values() for row in found.values())
    last = result["times"][str(LENGTHS[-1])]
    errors = [found["64"]["ridge 0.01"] for found in result["errors"].values()]
    rows = [row for found in result["errors"].values() for row in found.values()]
    nearer = sum(row["ridge 0.01"] < row["six steps"] for row in rows)
    return [
        Claim("The pseudo-inverse of Nystrom attention has a residual of at most 1e-5", "ours", f"{worst:.1e}", 1,
              "yes" if worst <= 1e-5 else "no", "nystrom_attention"),
        Claim("64 landmarks stand for 512 tokens within 10 %", "ours",
              f"error {min(errors):.0%} on slow walks, {max(errors):.0%} on a trained model", 1,
              "yes" if max(errors) <= 0.1 else "no", "nystrom_attention"),
        Claim("A ridge is nearer to exact attention than six steps of the usual iteration", "ours",
              f"in {nearer} of {len(rows)} cases", 1, "yes" if nearer == len(rows) else "no", "nystrom_attention"),
        Claim(f"Landmarks are quicker than exact attention at {LENGTHS[-1]:,} tokens", "post 8180",
              f"{last['exact'] / last['landmarks']:.1f} times", 1,
              "yes" if last["exact"] > last["landmarks"] else "no", "nystrom_attention"),
    ]  # fmt: skip
