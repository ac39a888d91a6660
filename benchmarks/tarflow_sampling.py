"""How long a TARFLOW takes to sample, and to train a step, beside the authors' code.

Same weights, same latents; images must agree to 1e-4 before anything is timed. The authors' sampler (apple/ml-tarflow)
is loaded from its file ``transformer_flow.py`` where ``QUINTIC_TARFLOW_REFERENCE`` names it; it is not part of this
project. Without it stands the same algorithm: token by token, keys and values appended to lists and joined anew in each
step, the pass without class after the one with it. One thread, CPU time and wall time, in turns, best of some rounds.

The flows are trained for a minute on drawn shapes first: how many sweeps a guess takes depends on what was learned.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import Claim, table
from benchmarks.study import one_thread
from quintic.core.machine import describe
from quintic.data.images import ImageConfig, as_signed, prepare_images
from quintic.flow import Guidance, TarFlow, plan_sampling
from quintic.flow.patches import to_image, to_tokens
from quintic.optim import Muon

VARIABLE = "QUINTIC_TARFLOW_REFERENCE"
SIZES = {4: (64, 300), 2: (32, 120)}
"""Patch: batch and steps of the training before."""
CASES = ((4, 1, False), (4, 16, False), (4, 100, False), (4, 1, True), (4, 16, True), (2, 1, False), (2, 16, False))
"""Patch, images at a time, guided."""
BARS = {
    (49, 1, False): 3.0, (49, 16, False): 2.2, (49, 100, False): 2.0, (49, 1, True): 5.0, (49, 16, True): 3.5,
    (196, 1, False): 5.0, (196, 16, False): 3.0,
}  # fmt: skip
ROUNDS = 7
WEIGHT = 0.5
"""Of guidance, growing, with attention at temperature 1."""
CLASSES = 10


def trained_flow(patch: int) -> TarFlow:
    """A flow of 28 x 28 pixels as small as the authors' toy example, with their "no label"."""
    data = prepare_images(None, ImageConfig(size=28))
    flow = TarFlow((1, 28, 28), patch=patch, width=64, blocks=4, layers=2, head_width=64, num_classes=CLASSES, seed=0)
    optimizer = Muon(flow, lr=0.01, weight_decay=0.01)
    batch, steps = SIZES[patch]
    torch.manual_seed(0)
    for step in range(steps):
        numbers = np.arange(step * batch, (step + 1) * batch) % len(data.train)
        x = torch.from_numpy(as_signed(data.train.images[numbers]))
        labels = torch.from_numpy(data.train.labels[numbers])
        labels = torch.where(torch.rand(batch) < 0.1, -1, labels)
        loss = -flow.log_prob(x + 0.1 * torch.randn_like(x), labels).mean() / flow.dims
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 20, 2.5 * (1 - step / steps))
        optimizer.step()
    with torch.no_grad():
        for block in flow.stack:
            block.classes[-1] = block.classes[:-1].mean(0)
    return flow.eval().requires_grad_(False)


def reference_module() -> ModuleType | None:
    """The authors' code, if the user says where it is."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("tarflow_reference", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_model(module: ModuleType, flow: TarFlow) -> Any:
    """The authors' model with our weights."""
    a = flow.arguments
    model = module.Model(1, a["shape"][1], a["patch"], a["width"], a["blocks"], a["layers"], num_classes=CLASSES)
    names = {
        "attention.norm": "attention_norm", "attention.qkv": "qkv", "attention.proj": "mix", "mlp.norm": "mlp_norm",
        "mlp.main.0": "up", "mlp.main.2": "down",
    }  # fmt: skip
    state = model.state_dict()
    for i, block in enumerate(flow.stack):
        own = block.state_dict()
        p = f"blocks.{i}."
        for kind in ("weight", "bias"):
            state[f"{p}proj_in.{kind}"] = own[f"enter.{kind}"]
            state[f"{p}proj_out.{kind}"] = own[f"leave.{kind}"]
            for j in range(a["layers"]):
                for theirs, ours in names.items():
                    state[f"{p}attn_blocks.{j}.{theirs}.{kind}"] = own[f"layers.{j}.{ours}.{kind}"]
        state[p + "pos_embed"] = own["position"].flip(0) if block.flipped else own["position"]
        state[p + "class_embed"] = own["classes"][:-1, None]
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def plain_inverse(flow: TarFlow, z: Tensor, labels: Tensor, weight: float) -> Tensor:
    """The authors' algorithm over our modules: lists of keys and values, joined in every step."""
    x = to_tokens(z, flow.patch)
    n, none = flow.tokens, torch.full_like(labels, CLASSES)
    for block in reversed(flow.stack):
        x = block.ordered(x).clone()
        lists = [[([], []) for _ in block.layers] for _ in range(2)]
        for i in range(n - 1):
            alpha, mu = _plain_step(block, x[:, i : i + 1], i, labels, lists[0])
            if weight:
                alpha_u, mu_u = _plain_step(block, x[:, i : i + 1], i, none, lists[1])
                w = weight * (i + 1) / (n - 1)
                alpha, mu = alpha + w * (alpha - alpha_u), mu + w * (mu - mu_u)
            x[:, i + 1] = x[:, i + 1] * alpha[:, 0].exp() + mu[:, 0]
        x = block.ordered(x)
    return to_image(x, flow.shape, flow.patch)


def _plain_step(block: Any, x: Tensor, i: int, labels: Tensor, lists: list) -> tuple[Tensor, ...]:
    h = block.enter(x) + block.position[i : i + 1] + block.classes[labels][:, None]
    b, _, w = h.shape
    for layer, (keys, values) in zip(block.layers, lists, strict=True):
        q, k, v = layer.qkv(layer.attention_norm(h)).view(b, 1, 3 * layer.heads, -1).transpose(1, 2).chunk(3, 1)
        keys.append(k)
        values.append(v)
        mixed = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))
        h = h + layer.mix(mixed.transpose(1, 2).reshape(b, 1, w))
        h = h + layer.down(F.gelu(layer.up(layer.mlp_norm(h))))
    return block.leave(h).chunk(2, -1)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Best CPU and wall seconds of each, taken in turns."""
    found = {name: {"cpu": math.inf, "wall": math.inf} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            found[name]["cpu"] = min(found[name]["cpu"], time.process_time() - cpu)
            found[name]["wall"] = min(found[name]["wall"], time.perf_counter() - wall)
    return found


def sampling_case(flow: TarFlow, module: ModuleType | None, batch: int, guided: bool) -> dict[str, Any]:
    """Times of one case, after the images have been compared."""
    noise = torch.randn(batch, flow.tokens, flow.numbers, generator=torch.Generator().manual_seed(1))
    z, labels = to_image(noise, flow.shape, flow.patch), torch.arange(batch) % CLASSES
    weight = WEIGHT if guided else 0.0
    guidance = Guidance(WEIGHT, schedule="growing") if guided else None
    plan = plan_sampling(flow, batch, guidance=guidance)
    if module is None:

        def theirs() -> Tensor:
            return plain_inverse(flow, z, labels, weight)
    else:
        model = reference_model(module, flow)

        def theirs() -> Tensor:
            with torch.no_grad():
                return model.reverse(noise.clone(), labels, guidance=weight, annealed_guidance=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return flow(z, labels)[0]

    images, inversion = flow.decode(z, labels, method=plan, guidance=guidance, certify=True)
    difference = float((images - theirs()).abs().max())
    assert difference <= 1e-4, f"images differ by {difference}"
    times = interleaved(
        {
            "theirs": theirs,
            "sequential": lambda: flow.decode(z, labels, method="sequential", guidance=guidance),
            "jacobi": lambda: flow.decode(z, labels, method="jacobi", guidance=guidance),
            "planned": lambda: flow.decode(z, labels, method=plan, guidance=guidance),
            "forward": forward,
        },
        ROUNDS if flow.tokens < 100 or batch < 16 else 3,
    )
    return {
        "tokens": flow.tokens, "batch": batch, "guided": guided, "difference": difference,
        "residual": inversion.residual, "windows": list(plan.windows), "sweeps": [r.sweeps for r in inversion.blocks],
        "seconds": times,
    }  # fmt: skip


def training_case(flow: TarFlow, module: ModuleType | None, batch: int) -> dict[str, Any] | None:
    """A step of training, forward, backward and AdamW, here and there."""
    if module is None:
        return None
    theirs, ours = reference_model(module, flow).train(), TarFlow(**flow.arguments, seed=0)
    ours.load_state_dict(flow.state_dict())
    x, labels = torch.randn(batch, *flow.shape), torch.arange(batch) % CLASSES
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.0) for m in (theirs, ours)]

    def step_theirs() -> None:
        optimizers[0].zero_grad()
        z, _, logdets = theirs(x, labels)
        theirs.get_loss(z, logdets).backward()
        optimizers[0].step()

    def step_ours() -> None:
        optimizers[1].zero_grad()
        (-ours.log_prob(x, labels).mean() / ours.dims).backward()
        optimizers[1].step()

    return {
        "tokens": flow.tokens,
        "batch": batch,
        "seconds": interleaved({"theirs": step_theirs, "ours": step_ours}, 5),
    }


def run() -> dict[str, Any]:
    with one_thread():
        module = reference_module()
        flows = {patch: trained_flow(patch) for patch in SIZES}
        cases = []
        for patch, batch, guided in CASES:
            cases.append(sampling_case(flows[patch], module, batch, guided))
            print(_row(cases[-1]), flush=True)
        training = training_case(flows[4], module, 32)
        return {
            "machine": describe(torch.device("cpu"), torch.float32),
            "peer": "apple/ml-tarflow" if module else "the same algorithm over our modules",
            "cases": cases,
            "training": training,
        }


def _ratio(case: dict[str, Any], method: str, kind: str = "cpu") -> float:
    return case["seconds"]["theirs"][kind] / case["seconds"][method][kind]


def _row(case: dict[str, Any]) -> list[str]:
    seconds = case["seconds"]
    return [
        f"{case['tokens']}", f"{case['batch']}", "yes" if case["guided"] else "no",
        *(f"{1e3 * seconds[name]['cpu']:.1f}" for name in ("theirs", "sequential", "jacobi", "planned", "forward")),
        f"{_ratio(case, 'planned'):.1f}x ({_ratio(case, 'planned', 'wall'):.1f}x)",
        f"{case['difference']:.0e}", " ".join(map(str, case["windows"])),
    ]  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    found = []
    for case in result["cases"]:
        key = (case["tokens"], case["batch"], case["guided"])
        least = min(_ratio(case, "planned"), _ratio(case, "planned", "wall"))
        what = f"{key[0]} tokens, batch {key[1]}" + (", guided" if key[2] else "")
        found.append(Claim(
            f"Exact samples of a TARFLOW at least {BARS[key]:g} times as fast as {result['peer']}; {what}", "ours",
            f"{least:.1f} times", 0, "yes" if least >= BARS[key] else "no", "tarflow_sampling",
        ))  # fmt: skip
    return found


def section(result: dict[str, Any]) -> str:
    m = result["machine"]
    head = (
        "tokens", "batch", "guided", "theirs", "sequential", "full Jacobi", "planned", "one forward pass",
        "planned: CPU (wall)", "largest difference", "windows by block",
    )  # fmt: skip
    lines = [
        "## TARFLOW: sampling time",
        "",
        f"`python -m benchmarks tarflow_sampling`. Theirs: {result['peer']}. Milliseconds of CPU time, one thread,",
        "best of some rounds in turns; same weights, same latents, images compared first. Flows of 28 x 28 pixels,",
        f"width 64, 4 blocks of 2 layers, trained for a moment. {m['cpu']}, torch {m['torch']}.",
        "",
        table(head, [_row(case) for case in result["cases"]]),
        "",
        "A window is the number of tokens guessed at a time: 1 is token by token, all of them full Jacobi. Blocks that",
        "were guessed include the check by a parallel pass.",
    ]
    if result["training"]:
        s = result["training"]["seconds"]
        lines += [
            "",
            f"A step of training at batch {result['training']['batch']}, {result['training']['tokens']} tokens "
            f"(forward, backward, AdamW): {1e3 * s['ours']['cpu']:.0f} ms here, "
            f"{1e3 * s['theirs']['cpu']:.0f} ms there, "
            f"{s['ours']['cpu'] / s['theirs']['cpu']:.2f} times.",
        ]
    return "\n".join(lines)
