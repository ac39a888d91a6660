"""Speed of the mixture-of-experts layer, forward and backward, as ratios measured in turn within one run.

Against the dense SwiGLU of the same active FLOPs, against transformers' DeepSeek-V3 experts (eager loop and grouped
path, same routing and weights), under a Zipf-skewed load against a balanced one, the share of router and dispatch, and
the same layer by torch's operators instead of the compiled kernels. Its products alone, on rows that are in order
already, are the floor of any layer that multiplies as torch does. Every contestant runs once per round, and the
smallest time counts: a slow moment of the machine hits all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims import Claim
from quintic.core import kernels
from quintic.core.kernels import Kernels, load_kernels

SHAPES = (
    (1024, 256, 128, 16, 2),
    (1024, 256, 64, 64, 8),
    (2048, 512, 128, 32, 4),
    (4096, 128, 128, 16, 2),
    (64, 256, 64, 64, 8),
)
"""Tokens, width, hidden width of an expert, experts, experts per token."""
SECONDS = 25.0
"""Per shape; at least five rounds."""


class Dense(nn.Module):
    """A SwiGLU of three ``nn.Linear``, as models have it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Foreign(nn.Module):
    """transformers' experts behind our router."""

    def __init__(self, layer: nn.Module, implementation: str) -> None:
        super().__init__()
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

        experts, width, hidden = layer.experts.down.shape
        config = DeepseekV3Config(
            hidden_size=width,
            moe_intermediate_size=hidden,
            n_routed_experts=experts,
            num_experts_per_tok=layer.router.top_k,
        )
        config._experts_implementation = implementation
        self.router = layer.router
        self.experts = DeepseekV3Experts(config)
        self.experts.gate_up_proj.data.copy_(layer.experts.gate_up)
        self.experts.down_proj.data.copy_(layer.experts.down)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x)
        return self.experts(x, routing.ids_nk, routing.gates_nk)


class Given(nn.Module):
    """Our experts with a routing that was decided before."""

    def __init__(self, layer: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.experts, self.ids = layer.experts, ids
        self.gates = nn.Parameter(torch.full(ids.shape, 1.0 / ids.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.ids, self.gates)


def balanced_ids(tokens: int, experts: int, k: int) -> Tensor:
    """Random order, equal load."""
    g = torch.Generator().manual_seed(0)
    start = torch.arange(tokens)[torch.randperm(tokens, generator=g)] * k % experts
    return (start[:, None] + torch.arange(k)) % experts


def zipf_ids(tokens: int, experts: int, k: int) -> Tensor:
    """Expert e is drawn with probability proportional to 1 / (1 + e), k different ones per token."""
    g = torch.Generator().manual_seed(0)
    share = 1.0 / torch.arange(1, experts + 1)
    return torch.multinomial(share.expand(tokens, experts), k, generator=g)


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(weight)

    return run


def router_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """The router alone, and the gradients that come back into it."""
    x = x.clone().requires_grad_()
    weight = torch.randn(len(x), layer.router.top_k, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        layer.router.zero_grad()
        x.grad = None
        layer.router(x).gates_nk.backward(weight)

    return run


def dispatch_step(x: Tensor, ids: Tensor, experts: int, hidden: int) -> Callable[[], None]:
    """What moves rows in a forward and a backward pass, without any product: sort, three gathers, two sums.

    The sums are of rows at hand: making them is the products' work. The kernels gather nothing: a product reads the
    rows of its tokens where they lie.
    """
    if (found := load_kernels()) is not None:
        return compiled_dispatch_step(found, x, ids, experts)
    from quintic.moe.dispatch import blocks_of, kept_rows, lay_out, plan_runs

    width, gates = x.shape[1], torch.full(ids.shape, 1.0 / ids.shape[1])
    products = torch.zeros(kept_rows(ids.numel(), experts), width)

    def run() -> None:
        counts = torch.bincount(ids.flatten(), minlength=experts)
        runs = plan_runs(counts.tolist(), width, 2 * hidden, cpu=True)
        token, rows = lay_out(ids, counts, runs)
        blocks = blocks_of(runs, cpu=True)
        y = products[: len(token)]
        wide = x.new_empty(max(block.stop - block.start for block in blocks), width)
        for weights in (gates, None):  # forward: tokens; backward: gradients and tokens
            for block in blocks:
                for _ in range(1 if weights is not None else 2):
                    torch.index_select(x, 0, token[block.start : block.stop], out=wide[: block.stop - block.start])
            F.embedding_bag(rows, y, mode="sum", per_sample_weights=weights)

    return run


def compiled_dispatch_step(found: Kernels, x: Tensor, ids: Tensor, experts: int) -> Callable[[], None]:
    n, k, d = *ids.shape, x.shape[1]
    gates, products, y = torch.full(ids.shape, 1.0 / k), torch.zeros(n * k, d), torch.zeros_like(x)
    counts, row, token = ids.new_empty(experts), torch.empty_like(ids), ids.new_empty(n * k)

    def run() -> None:
        found.call("experts_sort", n, k, experts, ids, counts, row, token)
        for weights in (gates, None):
            found.call("experts_sum", n, k, d, products, weights, row, None, y)

    return run


def by_torch(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same without compiled kernels."""

    def declined() -> Any:
        with mock.patch.object(kernels, "_found", lambda: (None, "declined")):
            return run()

    return declined


def products_step(layer: nn.Module, x: Tensor, ids: Tensor) -> Callable[[], None]:
    """The six products of a forward and a backward pass, called as the layer calls them."""
    from quintic.moe.dispatch import blocks_of, plan_runs
    from quintic.moe.products import outer_by_expert_, rows_by_expert_

    w_in, w_out = layer.experts.gate_up.detach(), layer.experts.down.detach()
    experts, width, hidden = w_out.shape
    runs = plan_runs(torch.bincount(ids.flatten(), minlength=experts).tolist(), width, 2 * hidden, cpu=True)
    rows = runs[-1].stop
    x_rd, h_rh, a_rf = (torch.randn(rows, size) for size in (width, 2 * hidden, hidden))
    v_rd, da_rf, dw_in, dw_out = (torch.empty_like(like) for like in (x_rd, a_rf, w_in, w_out))
    w_in_t, w_out_t = w_in.transpose(1, 2), w_out.transpose(1, 2)

    def run() -> None:
        for block in blocks_of(runs, cpu=True):
            x, h, a, v, da = (t[block.start : block.stop] for t in (x_rd, h_rh, a_rf, v_rd, da_rf))
            rows_by_expert_(block, None, x, w_in_t, h)
            rows_by_expert_(block, None, a, w_out_t, v)
            rows_by_expert_(block, None, v, w_out, da)
            outer_by_expert_(block, None, v, a, dw_out)
            outer_by_expert_(block, None, h, x, dw_in)
            rows_by_expert_(block, None, h, w_in, v)

    return run


def dense_products_step(width: int, hidden: int, x: Tensor) -> Callable[[], None]:
    """The six products of the dense network; gate and up as one, which favours it."""
    h, a, y = (torch.randn(len(x), size) for size in (2 * hidden, hidden, width))
    w_in, w_out = torch.randn(2 * hidden, width), torch.randn(width, hidden)
    da, dx, dw_in, dw_out = (torch.empty_like(like) for like in (a, x, w_in, w_out))

    def run() -> None:
        torch.mm(x, w_in.t(), out=h)
        torch.mm(a, w_out.t(), out=y)
        torch.mm(y, w_out, out=da)
        torch.mm(y.t(), a, out=dw_out)
        torch.mm(h.t(), x, out=dw_in)
        torch.mm(h, w_in, out=dx)

    return run


def race(contestants: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    best = dict.fromkeys(contestants, float("inf"))
    for run in contestants.values():
        run()
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begun)
        rounds += 1
    return best


def one(shape: tuple[int, ...], seconds: float) -> dict:
    from quintic.core.initial import initialize_
    from quintic.moe import MoE, NoBalance

    tokens, width, hidden, experts, k = shape
    layer = MoE(width, hidden, experts, k, num_shared=0, route_scale=1.0, balance=NoBalance(), initialize=False)
    initialize_(layer, 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g)
    balanced, zipf = balanced_ids(tokens, experts, k), zipf_ids(tokens, experts, k)
    ids = layer.router(x).ids_nk
    contestants = {
        "dense": step(Dense(width, k * hidden), x),
        "layer": step(layer, x),
        "layer by torch": by_torch(step(layer, x)),
        "transformers grouped": step(Foreign(layer, "grouped_mm"), x),
        "transformers eager": step(Foreign(layer, "eager"), x),
        "experts, balanced": step(Given(layer, balanced), x),
        "experts, zipf": step(Given(layer, zipf), x),
        "router": router_step(layer, x),
        "dispatch": dispatch_step(x, ids, experts, hidden),
        "products": products_step(layer, x, ids),
        "products of the dense": dense_products_step(width, k * hidden, x),
    }
    ms = {name: 1000.0 * value for name, value in race(contestants, seconds).items()}
    load = torch.bincount(zipf.flatten(), minlength=experts)
    return {
        "shape": list(shape),
        "ms": ms,
        "layer / dense": ms["layer"] / ms["dense"],
        "layer by torch / dense": ms["layer by torch"] / ms["dense"],
        "layer / transformers grouped": ms["layer"] / ms["transformers grouped"],
        "layer / transformers eager": ms["layer"] / ms["transformers eager"],
        "zipf / balanced": ms["experts, zipf"] / ms["experts, balanced"],
        "products / dense": ms["products"] / ms["dense"],
        "products of the dense / dense": ms["products of the dense"] / ms["dense"],
        "router share": ms["router"] / ms["layer"],
        "router and dispatch share": (ms["router"] + ms["dispatch"]) / ms["layer"],
        "zipf MaxVio": float(load.max() * experts / load.sum() - 1),
    }


def run() -> dict:
    from quintic.core.machine import describe

    machine = describe(torch.device("cpu"), torch.float32)
    rows = []
    for shape in SHAPES:
        rows.append(one(shape, SECONDS))
        shown = {name: value for name, value in rows[-1].items() if isinstance(value, float)}
        print(shape, {name: round(value, 3) for name, value in shown.items()}, flush=True)
    return {"machine": machine, "seconds": SECONDS, "shapes": rows}


def section(result: dict) -> str:
    m = result["machine"]
    columns = (
        "layer / dense",
        "layer by torch / dense",
        "products / dense",
        "products of the dense / dense",
        "layer / transformers grouped",
        "layer / transformers eager",
        "zipf / balanced",
        "router share",
        "router and dispatch share",
    )
    lines = [
        "## Speed of the mixture-of-experts layer",
        "",
        "`python -m benchmarks moe_speed`. Forward and backward in float32, ratios of the smallest times of",
        f"contestants that ran in turn. Machine: {m['cpu']}, {m['threads']} threads, torch {m['torch']}; "
        f"kernels: {m.get('kernels', 'torch')}.",
        "",
        "| tokens, width, expert, experts, k | layer, ms | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for row in result["shapes"]:
        cells = [", ".join(str(n) for n in row["shape"]), f"{row['ms']['layer']:.1f}"]
        cells += [f"{row[name]:.0%}" if "share" in name else f"{row[name]:.2f}" for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(result["shapes"], key=lambda row: row["zipf MaxVio"])["zipf MaxVio"]
    lines += [
        "",
        "Dense: three `nn.Linear` of hidden width k times that of an expert, so the same active FLOPs. transformers:",
        "the experts of DeepSeek-V3 by their eager loop and by their grouped path, behind the router of this package.",
        f"Zipf: expert e with probability proportional to 1/e (MaxVio up to {worst:.1f}). Router: scores, selection",
        "and gates with their gradients. Dispatch: sorting, gathering and adding up rows, without the products.",
        "By torch: the same layer with `QUINTIC_KERNELS=torch`. Products: its six products alone, on rows in order,",
        "into memory at hand; what is between the two is the router, rows that move, activations and calls.",
    ]
    return "\n".join(lines)


def claims(result: dict) -> list[Claim]:
    rows = result["shapes"]
    many = [row for row in rows if row["shape"][3] >= 64]
    large = [row for row in rows if row["shape"][0] >= 1024]
    made = [
        ("16 to 32 experts take at most 1.6 times a dense feed-forward of the same active FLOPs", "layer / dense",
         [row for row in large if row["shape"][3] < 64], 1.6),
        ("64 experts take at most 2 times a dense feed-forward of the same active FLOPs", "layer / dense",
         [row for row in large if row["shape"][3] >= 64], 2.0),
        ("64 tokens on 64 experts take at most 5.5 times as long", "layer / dense",
         [row for row in rows if row["shape"][0] < 1024], 5.5),
        ("Never slower than the grouped path of transformers", "layer / transformers grouped", rows, 1.0),
        ("64 experts take at most 0.3 of the eager loop of transformers", "layer / transformers eager", many, 0.3),
        ("A Zipf load takes at most 1.5 times a balanced one", "zipf / balanced", rows, 1.5),
        ("Router and dispatch take at most 15 % of the layer", "router and dispatch share", rows, 0.15),
    ]  # fmt: skip
    found = []
    for text, key, among, bar in made:
        values = [row[key] for row in among]
        low, high = (f"{v:.0%}" if "share" in key else f"{v:.2f}" for v in (min(values), max(values)))
        measured = high if low == high else f"{low} to {high}"
        found.append(Claim(text, "ours", measured, 0, "yes" if max(values) <= bar else "no", "moe_speed"))
    return found
