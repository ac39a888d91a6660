"""The rules of loss-free balance on a router that does not learn: fresh random tokens, a fixed preference per expert.

Logits are normal plus an offset per expert, scores their sigmoid. Here the floor of random routing can be reached, and
a rate can be judged without a language model: how soon a rule balances, and how far from the floor it stays. Second,
the quantile rule with the midpoint cutoff against the cutoff of the posts, the runner-up's score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.claims import Claim, table
from benchmarks.plot import Line, draw, image
from quintic.core.counter_rng import Stream
from quintic.moe import LossFree, max_violation, sampling_floor
from quintic.moe.quantile import margin_histogram

RATES = {
    "sign": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "relative": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "rms": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "floored-rms": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "quantile": (0.01, 0.03, 0.1, 0.3, 1.0),
}
NEAR = 1.5
"""A rate works if the late MaxVio is below so many floors."""
_POOL = 64  # batches, used in turn
_LATE = 0.75


class Size(NamedTuple):
    tokens: int
    experts: int
    top_k: int

    @property
    def floor(self) -> float:
        return sampling_floor(*self)


SIZES = (Size(2048, 16, 2), Size(1024, 32, 4), Size(4096, 32, 4))


@cache
def scores(size: Size) -> list[Tensor]:
    """Sigmoid scores of the batches."""
    offset = torch.from_numpy(Stream(0, "offset").normal(0, size.experts))
    logits = torch.from_numpy(Stream(0, "tokens").normal(0, _POOL * size.tokens * size.experts))
    return list(torch.sigmoid(logits.view(_POOL, size.tokens, size.experts) + offset).float())


def simulate(size: Size, step: Callable[[Tensor, Tensor, Tensor], None], steps: int) -> dict[str, float]:
    """``step(bias, biased scores, counts)`` moves the bias; MaxVio of late batches and of all of them together."""
    bias, seen, late = torch.zeros(size.experts), [], torch.zeros(size.experts, dtype=torch.int64)
    for i in range(steps):
        biased = scores(size)[i % _POOL] + bias
        counts = torch.bincount(biased.topk(size.top_k).indices.flatten(), minlength=size.experts)
        step(bias, biased, counts)
        seen.append(max_violation(counts))
        late += counts * (i >= _LATE * steps)
    above = [i for i, violation in enumerate(seen) if violation > 2 * NEAR * size.floor]
    return {
        "late": statistics.fmean(seen[int(_LATE * steps) :]),
        "all": max_violation(late),
        "from": (above[-1] + 2 if above else 1) if not above or above[-1] + 1 < steps else math.inf,
    }


def rule(size: Size, name: str, rate: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    balance = LossFree(name, rate)

    def step(bias: Tensor, biased: Tensor, counts: Tensor) -> None:
        histogram = margin_histogram(biased, size.top_k) if balance.wants_histogram else None
        balance.step(bias, counts, size.top_k, histogram_eb=histogram)

    return step


def exact_quantile(size: Size, middle: bool, rate: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The quantile rule by sorting, with the midpoint or the runner-up for a cutoff."""

    def step(bias: Tensor, biased: Tensor, counts: Tensor) -> None:
        best = biased.topk(size.top_k + 1).values
        cutoff = (best[:, -2:].mean(1) if middle else best[:, -1]).unsqueeze(1)
        cut = (biased - cutoff).quantile(1.0 - size.top_k / size.experts, dim=0)
        bias -= rate * (cut - cut.mean())

    return step


def run(
    sizes: Sequence[Size] = SIZES, rates: Mapping[str, Sequence[float]] = RATES, steps: int = 400
) -> dict[str, Any]:
    swept = [
        {**size._asdict(), "floor": size.floor, "rule": name, "rate": rate}
        | simulate(size, rule(size, name, rate), steps)
        for size in sizes
        for name, some in rates.items()
        for rate in some
    ]  # fmt: skip
    cuts = [
        {**size._asdict(), "floor": size.floor, "cutoff": name, "rate": rate, **simulate(size, step(rate), steps)}
        for size in sizes
        for rate in (0.1, 1.0)
        for name, step in (
            ("runner-up, sorted", lambda rate, size=size: exact_quantile(size, False, rate)),
            ("midpoint, sorted", lambda rate, size=size: exact_quantile(size, True, rate)),
            ("midpoint, histogram", lambda rate, size=size: rule(size, "quantile", rate)),
        )
    ]
    return {"steps": steps, "near": NEAR, "rules": swept, "cuts": cuts}


def _cell(row: Mapping[str, Any]) -> str:
    soon = f" ({row['from']:.0f})" if row["from"] < math.inf else ""
    return f"{row['rate']:g}: {row['late'] / row['floor']:.2f}{soon}"


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['tokens']} tokens, top {row['top_k']} of {row['experts']}"


def longest_range(rows: Sequence[tuple[float, float]], near: float = NEAR) -> tuple[float, float]:
    """The widest stretch of neighbouring rates whose MaxVio is at most so many floors; (0, 0) if there is none.

    Args:
        rows: Pairs of a rate and a MaxVio in floors.
        near: How many floors are near.

    Example:
        >>> longest_range([(0.1, 1.2), (0.3, 9.0), (0.01, 1.4), (0.001, 3.0)])
        (0.01, 0.1)
    """
    stretches, current = [], []
    for rate, floors in sorted(rows):
        current = [*current, rate] if floors <= near else []
        if current:
            stretches.append((current[0], rate))
    return max(stretches, key=lambda ends: ends[1] / ends[0], default=(0.0, 0.0))


def _groups(rows: Sequence[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def section(result: dict) -> str:
    parts = [
        "## Rules of loss-free balance on a simulated router",
        "`python -m benchmarks balance_rules`: MaxVio of late batches in floors of random routing, over "
        f"{result['steps']} steps;\nin brackets the step from which all are within {2 * result['near']:g} floors.",
    ]
    for group in _groups(result["rules"], "tokens", "experts", "top_k").values():
        rows = []
        for (name,), some in _groups(group, "rule").items():
            cells = [_cell(row) for row in some]
            low, high = longest_range([(row["rate"], row["late"] / row["floor"]) for row in some], result["near"])
            rows.append((name, ", ".join(cells), f"{high / low:.0f} times, {low:g} to {high:g}" if low else "none"))
        parts += [
            _title(group[0]) + ":",
            table(("rule", "rate: late MaxVio", f"range within {result['near']} floors"), rows),
        ]
    rows = [
        (_title(row), f"{row['rate']:g}", row["cutoff"], f"{row['late'] / row['floor']:.2f}", f"{row['all']:.3f}")
        for row in result["cuts"]
    ]
    head = ("size", "rate", "cutoff", "late MaxVio, in floors", "MaxVio of all late batches together")
    parts += [
        "The cutoff of the quantile rule:",
        table(head, rows),
        image("balance-rates", "Late MaxVio against the rate"),
    ]
    return "\n\n".join(parts)


def plots(result: dict) -> dict[str, str]:
    first = next(iter(_groups(result["rules"], "tokens", "experts", "top_k").values()))
    lines = [
        Line(name, [row["rate"] for row in rows], [row["late"] for row in rows])
        for (name,), rows in _groups(first, "rule").items()
    ]
    rules = {"random": first[0]["floor"]}
    title = f"MaxVio of late batches against the rate, {_title(first[0])}"
    return {"balance-rates": draw(title, lines, x="rate", y="MaxVio", log_x=True, log_y=True, rules=rules)}


def claims(result: dict) -> list[Claim]:
    found = []
    for (name,), rows in _groups(result["rules"], "rule").items():
        if name not in ("floored-rms", "quantile"):
            continue
        ranges = [
            longest_range([(row["rate"], row["late"] / row["floor"]) for row in some], result["near"])
            for some in _groups(rows, "tokens", "experts", "top_k").values()
        ]
        least = min((high / low if low else 0.0) for low, high in ranges)
        found.append(Claim(
            f"{name} works over a 30-fold range of its rate on a simulated router", "ours",
            f"within {result['near']} floors over {least:.0f} times or more in {len(ranges)} sizes", 0,
            "yes" if least >= 29.0 else "no", "balance_rules",
        ))  # fmt: skip
    by_cut = {name: [row["all"] for row in rows] for (name,), rows in _groups(result["cuts"], "cutoff").items()}
    runner_up, midpoint = by_cut["runner-up, sorted"], by_cut["midpoint, histogram"]
    ratios = [a / b for a, b in zip(runner_up, midpoint, strict=True)]
    found.append(Claim(
        "A midpoint cutoff balances better than the (k + 1)-th score", "quintic, against post 11619",
        f"MaxVio of all late batches together {min(ratios):.1f} to {max(ratios):.1f} times smaller", 0,
        "yes" if min(ratios) > 1.0 else "no", "balance_rules",
    ))  # fmt: skip
    return found
