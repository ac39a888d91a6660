"""How near a training step of the laptop preset comes to its floor, the FLOPs over the measured peak of products.

The whole step is that of the training loop (the median of the metrics that ``quintic train`` writes). Its parts are
timed by themselves, forward and backward, on tensors of the same shapes, in turns; what they leave of the whole is the
rest: embedding, residual sums, data, clipping, balancing. A part reaches

    fraction of the peak = (FLOPs / time in products / peak) * (time in products / time),

and torch's profiler tells the time in products, so that the two factors say why it is below: slow products, or work
beside them. The kernels in C, which hold products and what is between them, count as products. FLOPs are those of the
products: of the causal half of attention, and what its backward pass computes again is not counted. Variants change
the preset at about equal active parameters.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims import Claim, table
from quintic.cli.wiring import build_settings, build_task
from quintic.core.machine import describe, matmul_peak, matrix_units
from quintic.lm import LanguageModel
from quintic.lm.attention import causal_attention, fits_causal_attention
from quintic.lm.cross_entropy import linear_cross_entropy
from quintic.moe import MoE
from quintic.optim import build_optimizer

CPU = torch.device("cpu")
BAR = 0.45
STEPS, ROUNDS = 24, 9
AS_IT_IS = "as it is"
_WIDE_HEADS = ["lm.num_heads=2", "lm.qk_nope_dim=32", "lm.qk_rope_dim=32", "lm.v_dim=64"]
_FEW_EXPERTS = ["lm.num_experts=8", "lm.d_expert=128", "lm.top_k=2", "lm.num_shared=0"]
VARIANTS: dict[str, list[str]] = {
    AS_IT_IS: [],
    "batch 32": ["engine.batch_size=32"],
    "batch 16 in halves": ["engine.micro_batch_size=8"],
    "context 512, batch 8": ["lm.context=512", "engine.batch_size=8"],
    "8 experts, twice as wide, top 2, none shared": _FEW_EXPERTS,
    "32 experts, half as wide, top 7": ["lm.num_experts=32", "lm.d_expert=32", "lm.top_k=7"],
    "dense": ["lm.dense=true"],
    "2 heads, twice as wide": _WIDE_HEADS,
    "2 layers, width 192": ["lm.d_model=192", "lm.num_layers=2", "lm.d_ff=576", "lm.d_expert=96"],
    "compiled blocks": ["lm.compile=true"],
    "8 wide experts, 2 wide heads, batch 32": [*_FEW_EXPERTS, *_WIDE_HEADS, "engine.batch_size=32"],
}
"""Settings beyond the preset's."""
_KERNELS = {
    *(f"quintic::{name}_{way}" for name in ("routed", "dense") for way in ("forward", "backward")),
    *(
        f"quintic::{name}{end}"
        for name in ("latent_attention", "causal_attention", "route")
        for end in ("", "_backward")
    ),
}
_PRODUCTS = {f"aten::{name}{end}" for name in ("mm", "addmm", "bmm", "baddbmm") for end in ("", "_")} | {
    f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")
}


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Of the causal half of both products, forward.

    Example:
        >>> attention_flops((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 6))
        1280
    """
    batch, heads, time, width = query
    return batch * heads * time * key[2] * (width + value[3])


def fused_attention_flops(q: Sequence[int], kv: Sequence[int], key: Sequence[int], turns: Sequence[int]) -> int:
    """The same, from the inputs of :func:`quintic.lm.attention.causal_attention`.

    Example:
        >>> fused_attention_flops((1, 8, 2 * 4), (1, 8, 2 * (3 + 6)), (1, 8, 1), (8, 2))
        1280
    """
    (batch, time, _), width = q, 2 * turns[1]
    heads = q[2] // width
    value = kv[2] // heads - (width - key[2])
    return attention_flops((batch, heads, time, width), (batch, heads, time, width), (batch, heads, time, value))


def latent_attention_flops(x: Sequence[int], weights: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[int, int]:
    """Of the projections, and of attention alone, from the inputs of :mod:`quintic.lm.mla_kernel`."""
    (batch, time, _), (heads, nope, rope, v_dim, _) = x, sizes
    heads_of = (batch, heads, time, nope + rope)
    projections = 2 * batch * time * sum(w[0] * w[1] for w in weights if len(w) == 2)
    return projections, attention_flops(heads_of, heads_of, (*heads_of[:3], v_dim))


def flops_of(act: Callable[[], object]) -> int:
    """FLOPs of the products in a call, by torch's counter and what it does not know."""
    aten, own = torch.ops.aten, torch.ops.quintic

    def there(x: Any, turns: Any, weights: Any, sizes: Any, *_: Any, **__: Any) -> int:
        return sum(latent_attention_flops(x, weights, sizes))

    def back(dy: Any, x: Any, turns: Any, weights: Any, kept: Any, sizes: Any, *_: Any, **__: Any) -> int:
        return 2 * sum(latent_attention_flops(x, weights, sizes))

    unknown = {
        own.latent_attention: there,
        own.latent_attention_backward: back,
        own.causal_attention: lambda q, kv, key, turns, *_, **__: fused_attention_flops(q, kv, key, turns),
        own.causal_attention_backward: (
            lambda grad, q, kv, key, turns, *_, **__: 2 * fused_attention_flops(q, kv, key, turns)
        ),
        aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: attention_flops(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: 2 * attention_flops(q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        act()
    return counter.get_total_flops()


def seconds_in_products(act: Callable[[], object], names: set[str], rounds: int = 3) -> float:
    """Median over calls of the time within operators of these names."""
    found = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            act()
        found.append(1e-6 * sum(row.self_cpu_time_total for row in seen.key_averages() if row.key in names))
    return statistics.median(found)


def trained(settings: list[str], steps: int, size: str, dtype: str = "float32") -> dict[str, float]:
    """Medians over the later half of some steps of ``quintic train``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "quintic", "train", "--size", size, "--dtype", dtype, "--out", str(out),
            f"engine.steps={steps}", "engine.eval_every=0", "engine.sample_every=0", "engine.checkpoint_every=0",
            "engine.diagnose_every=0", *settings,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(rows)]
    half = len(times) // 2
    seconds = statistics.median(times[half:])
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": (rows[1]["tokens"] - rows[0]["tokens"]) / seconds,
        "optimizer_share": statistics.median(row["optimizer_share"] for row in rows[1 + half :]),
    }


def prepared(settings: list[str], size: str) -> tuple[LanguageModel, torch.optim.Optimizer, Callable[[], None], int]:
    """A model with gradients, its optimizer, a forward and backward pass of its batch, and the size of that."""
    built = build_settings("lm", size, settings)
    task, built, _ = build_task("lm", [], built)
    model = task.build(0).train()
    assert isinstance(model, LanguageModel)
    optimizer = build_optimizer(model, built["optim"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the same work, and the model stays as it is
    batch = built["engine"].batch_size
    tensors = task.batch(np.arange(batch))

    def there_and_back() -> None:
        optimizer.zero_grad()
        task.loss(model, tensors).total.backward()

    there_and_back()
    return model, optimizer, there_and_back, batch


def step_gflop(settings: list[str], size: str) -> dict[str, float]:
    """GFLOP of a step, forward, backward and optimizer, and active parameters."""
    eager = [setting for setting in settings if not setting.startswith("lm.compile")]  # the same work, and countable
    model, optimizer, there_and_back, _ = prepared(eager, size)
    return {
        "gflop": (flops_of(there_and_back) + flops_of(optimizer.step)) / 1e9,
        "active": model.num_parameters()[1],
    }


def attended(block: Any, x: Tensor, rotation: Tensor) -> Tensor:
    """The first half of a block."""
    y = block.attention.add_to_stream(x, block.attention_norm, rotation)
    return x + block.attention(block.attention_norm(x), rotation) if y is None else y


def attention_alone(model: LanguageModel, batch: int) -> Callable[[], None]:
    """Attention of one layer without its projections, there and back."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    width = c.qk_nope_dim + c.qk_rope_dim

    def rows(size: int) -> Tensor:
        return torch.randn(batch, c.context, size, generator=generator).requires_grad_()

    q, key = rows(c.num_heads * width), rows(c.qk_rope_dim)
    kv = rows(c.num_heads * (c.qk_nope_dim + c.v_dim))
    dout = torch.randn(batch, c.context, c.num_heads * c.v_dim, generator=generator)
    if fits_causal_attention(q, kv, key, model.rotation):
        return lambda: causal_attention(q, kv, key, model.rotation, width**-0.5).backward(dout)
    query, keys, values = (rows(c.num_heads * size).view(batch, c.context, c.num_heads, size).transpose(1, 2)
                           for size in (width, width, c.v_dim))  # fmt: skip

    def act() -> None:
        y = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
        y.backward(torch.ones_like(y))

    return act


def parts_of(model: LanguageModel, optimizer: torch.optim.Optimizer, batch: int) -> dict[str, Callable[[], object]]:
    """What a step does, each part as an act on tensors of its shapes."""
    c = model.config
    blocks: list[Any] = list(model.blocks)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c.context, c.d_model, generator=generator)
    targets = torch.randint(c.vocab_size, (batch, c.context), generator=generator)

    def act(runs: Sequence[tuple[Callable[[Tensor], Tensor], Sequence[nn.Module]]]) -> Callable[[], None]:
        def there_and_back() -> None:
            for run, modules in runs:
                for module in modules:
                    module.zero_grad()
                y = run(x.detach().requires_grad_())
                y.backward(torch.ones_like(y))

        return there_and_back

    def feed_forward(kind: type[nn.Module]) -> Callable[[], None]:
        return act([
            (lambda h, b=b: b.ffn(b.ffn_norm(h)), (b.ffn, b.ffn_norm)) for b in blocks if isinstance(b.ffn, kind)
        ])  # fmt: skip

    dense = next(type(block.ffn) for block in blocks if not isinstance(block.ffn, MoE))
    return {
        "attention": act([
            (lambda h, b=b: attended(b, h, model.rotation), (b.attention, b.attention_norm)) for b in blocks
        ]),
        "experts, router": feed_forward(MoE),
        "dense feed-forward": feed_forward(dense),
        "head, loss": act([
            (lambda h: linear_cross_entropy(model.norm(h), model.head.weight, targets), (model.norm, model.head))
        ]),
        "optimizer": optimizer.step,
    }  # fmt: skip


def in_turns(acts: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, two turns before not counted."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(rounds + 2):
        for name, act in acts.items():
            began = time.perf_counter()
            act()
            if turn > 1:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in found.items()}


def run(
    size: str = "laptop", variants: dict[str, list[str]] = VARIANTS, steps: int = STEPS, rounds: int = ROUNDS
) -> dict[str, Any]:
    peak = matmul_peak(CPU, torch.float32, remeasure=True)
    model, optimizer, _, batch = prepared([], size)
    acts = parts_of(model, optimizer, batch)
    seconds = in_turns(acts, rounds)
    parts = {
        name: {
            "gflop": flops_of(act) / 1e9,
            "ms": 1e3 * seconds[name],
            "products_ms": 1e3 * seconds_in_products(act, _PRODUCTS | _KERNELS),
        }
        for name, act in acts.items()
    }
    c = model.config
    heads = (batch, c.num_heads, c.context, c.qk_nope_dim + c.qk_rope_dim)
    kernel = {
        "gflop": 3 * c.num_layers * attention_flops(heads, heads, (*heads[:3], c.v_dim)) / 1e9,
        "ms": 1e3 * c.num_layers * in_turns({"alone": attention_alone(model, batch)}, rounds)["alone"],
    }
    whole = {}
    for title, changes in variants.items():
        whole[title] = trained(changes, steps, size) | step_gflop(changes, size)
        print(title, whole[title], flush=True)
    half = None
    if matrix_units():
        half = trained([], steps, size, "bfloat16")
        half["peak_gflops"] = matmul_peak(CPU, torch.bfloat16, remeasure=True) / 1e9
    peak = max(peak, matmul_peak(CPU, torch.float32, remeasure=True))
    return {
        "machine": describe(CPU, torch.float32), "size": size, "batch": batch, "peak_gflops": peak / 1e9,
        "parts": parts, "attention_kernel": kernel, "variants": whole, "bfloat16": half,
    }  # fmt: skip


def fraction(result: dict[str, Any], title: str = AS_IT_IS) -> float:
    """Of the peak, by a whole step."""
    step = result["variants"][title]
    return step["gflop"] / result["peak_gflops"] / (1e-3 * step["step_ms"])


def best_change(result: dict[str, Any]) -> str:
    """Title of the variant with the largest fraction."""
    return max((title for title in result["variants"] if title != AS_IT_IS), key=lambda title: fraction(result, title))


def section(result: dict[str, Any]) -> str:
    m, peak, whole = result["machine"], result["peak_gflops"], result["variants"][AS_IT_IS]
    parts, kernel, step = result["parts"], result["attention_kernel"], whole["step_ms"]
    rows = []
    for name, p in parts.items():
        floor = 1e3 * p["gflop"] / peak
        rows.append((
            name, f"{p['gflop']:.2f}", f"{floor:.1f}", f"{p['ms']:.1f}", f"{floor / p['ms']:.0%}",
            f"{floor / p['products_ms']:.0%}", f"{p['products_ms'] / p['ms']:.0%}", f"{p['ms'] / step:.0%}",
        ))  # fmt: skip
    rest = step - sum(p["ms"] for p in parts.values())
    floor = 1e3 * whole["gflop"] / peak
    rows += [
        ("rest", "", "", f"{rest:.1f}", "", "", "", f"{rest / step:.0%}"),
        ("whole step", f"{whole['gflop']:.2f}", f"{floor:.1f}", f"{step:.1f}", f"{floor / step:.0%}", "", "", "100%"),
    ]
    head = ("part", "GFLOP", "floor, ms", "ms", "of the peak", "its products reach", "products' share of its time",
            "of the step")  # fmt: skip
    variants = [
        (title, f"{v['active']:,.0f}", f"{v['gflop']:.1f}", f"{v['step_ms']:.0f}", f"{v['tokens_per_second']:,.0f}",
         f"{v['optimizer_share']:.0%}", f"{fraction(result, title):.0%}")
        for title, v in result["variants"].items()
    ]  # fmt: skip
    best = best_change(result)
    half, in_half = result.get("bfloat16"), ()
    if half:
        part = whole["gflop"] / half["peak_gflops"] / (1e-3 * half["step_ms"])
        in_half = (
            f"In bfloat16, for which this processor has matrix units, a step takes {half['step_ms']:.0f} ms, "
            f"{half['tokens_per_second']:,.0f} tokens a second:\n{part:.0%} of a peak of {half['peak_gflops']:,.0f} "
            "GFLOP/s.",
        )
    reached = 1e3 * kernel["gflop"] / peak / kernel["ms"]
    return "\n\n".join([
        "## The floor of a training step",
        f"`python -m benchmarks step_floor`: the {result['size']} preset at its own batch of {result['batch']} "
        f"windows; {peak:,.0f} GFLOP/s is the peak of\nlarge float32 products, measured in the same run. The step is "
        "timed in training, its parts by themselves on tensors of\nthe same shapes, and the rest is what they leave; "
        "kernels in C count as products. "
        f"{m['cpu']}, {m['threads']} threads,\ntorch {m['torch']}; kernels: {m.get('kernels', 'torch')}.",
        table(head, rows),
        "Why a part is below the peak: \"of the peak\" is what its products reach times their share of its time. The "
        f"fused\nattention kernel, whose exponentials are not counted, reaches {reached:.0%} and "
        f"takes {kernel['ms']:.1f} ms of the attention.\n{_least(parts, peak)}",
        *in_half,
        f"Changes of the preset. The one that comes nearest to the peak is \"{best}\", {fraction(result, best):.0%}:",
        table(("preset", "active parameters", "GFLOP a step", "step, ms", "tokens a second", "optimizer's share",
               "of the peak"), variants),
    ])  # fmt: skip


def _least(parts: dict[str, dict[str, float]], peak: float) -> str:
    """Where the most time is lost, in words."""

    def lost(name: str) -> float:
        return parts[name]["ms"] - 1e3 * parts[name]["gflop"] / peak

    most = max(parts, key=lost)
    p = parts[most]
    slow = p["products_ms"] - 1e3 * p["gflop"] / peak
    return (
        f"Most is lost in {most}: {lost(most):.1f} ms above the floor, {slow:.1f} of them in products slower than the "
        f"peak and {p['ms'] - p['products_ms']:.1f} outside products."
    )


def claims(result: dict[str, Any]) -> list[Claim]:
    found, best = fraction(result), best_change(result)
    changed = fraction(result, best)
    reaches = "reaches" if changed >= BAR else "is the best change tried, at"
    return [Claim(
        f"A step of the laptop preset reaches {BAR:.0%} of the peak of matrix products", "ours",
        f"{found:.0%}; \"{best}\" {reaches} {changed:.0%}", 1, "yes" if found >= BAR else "no", "step_floor",
    )]  # fmt: skip
