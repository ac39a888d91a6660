"""How long a step of Muon takes: here, in torch as shipped, in a plain float32 loop, and in other packages.

torch's, Keller's and pytorch_optimizer's Muon multiply in bfloat16 whatever the processor; the loop is torch's method
in float32, one matrix after the other, which is the honest bar on a processor without fast bfloat16. All take their
steps in turns within one process, one thread each, and medians are compared. Expert stacks are given to all as single
matrices, which is the same work. heavyball runs uncompiled: to compile takes it minutes for each list of shapes.

Where bfloat16 is fast, ours runs a second time with ``ns_dtype=bfloat16``, to be compared with those. Where the
processor has AVX-512, some lists are measured again in a process that is limited to AVX2, where torch multiplies in
bfloat16 as it does on a processor that has no instructions for it: all contestants alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, table
from benchmarks.study import one_thread
from quintic.core.machine import autocast, describe, matrix_units, pick_device, pick_dtype
from quintic.linalg import msign
from quintic.lm import LanguageModel, LMConfig
from quintic.optim import Muon

STACKS = ((24, 64, 64), (24, 128, 128), (12, 256, 256), (12, 64, 256), (8, 128, 512))
"""(matrices, rows, columns)."""
SECONDS = 8.0
"""For each list of matrices; three rounds at least."""
LAPTOP_VOCABULARY = 1088  # what the embedded corpus gets
GPT_LIST = "GPT, 12 layers, width 128"
BF16 = "quintic, bfloat16"
LIMITED = ("24 x (64, 64)", GPT_LIST, "laptop preset")
"""Lists that are measured under AVX2 too."""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Environment that limits torch's own kernels and both of its libraries of products."""


def matrix_lists() -> dict[str, list[tuple[int, int]]]:
    """Shapes by name: the stacks, a GPT of 12 layers and width 128, and the laptop preset's matrices."""
    lists = {f"{count} x ({n}, {m})": [(n, m)] * count for count, n, m in STACKS}
    lists[GPT_LIST] = ([(128, 128)] * 4 + [(512, 128), (128, 512)]) * 12
    laptop = LanguageModel(LMConfig.preset("laptop"), initialize=False)
    rows = Muon(laptop).roles
    assert rows is not None
    lists["laptop preset"] = [(p.n, p.m) for row in rows for p in row.parts for _ in range(p.matrices)]
    return lists


def loop(G: Tensor) -> Tensor:
    """Newton-Schulz as torch.optim.Muon has it, but in G's own dtype."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.T if G.shape[0] > G.shape[1] else X


class LoopMuon(torch.optim.Optimizer):
    """A float32 loop over the matrices, nothing else."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = loop(p.grad.lerp(momentum, 0.95))
            p.mul_(1 - 1e-3 * 0.1)
            p.add_(update, alpha=-1e-3 * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def peers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Optimizers by name; those of other packages if they are installed (``pip install quintic[bench]``)."""
    found: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "quintic": Muon,
        "float32 loop": LoopMuon,
        "torch": torch.optim.Muon,
    }
    if matrix_units():
        found[BF16] = lambda params: Muon(params, ns_dtype=torch.bfloat16)
    with contextlib.suppress(ImportError):
        import muon

        found["Keller's"] = muon.SingleDeviceMuon
    with contextlib.suppress(ImportError):
        import pytorch_optimizer

        found["pytorch_optimizer"] = lambda params: pytorch_optimizer.Muon([{"params": params, "use_muon": True}])
    with contextlib.suppress(ImportError):
        import heavyball

        heavyball.utils.compile_mode = None
        found["heavyball"] = heavyball.Muon
    return found


def timed(actions: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 3) -> dict[str, float]:
    """Median seconds of each action, in turns, the first turn not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    ended = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or (time.perf_counter() < ended and turn < 200):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - began)
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


def step_times(shapes: Sequence[tuple[int, int]], seconds: float) -> dict[str, float | None]:
    """Seconds of one step of each optimizer over matrices of these shapes; None where it fails."""
    actions: dict[str, Callable[[], Any]] = {}
    failed: dict[str, None] = {}
    for name, make in peers().items():
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, m, generator=generator)) for n, m in shapes]
        gradients = [torch.randn(n, m, generator=generator) for n, m in shapes]
        optimizer = make(params)

        def action(optimizer: torch.optim.Optimizer = optimizer, params=params, gradients=gradients) -> None:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g  # heavyball takes it away, some write into it
            optimizer.step()

        try:
            action()
        except Exception as error:
            print(f"{name} fails: {error}"[:200])
            failed[name] = None
        else:
            actions[name] = action
    return {**timed(actions, seconds), **failed}


def limited_step_times(shapes: Sequence[tuple[int, int]], seconds: float) -> dict[str, float | None]:
    """:func:`step_times` in a process that is limited to AVX2."""
    command = [sys.executable, "-m", "benchmarks.muon_speed", json.dumps(shapes), str(seconds)]
    done = subprocess.run(command, env={**os.environ, **AVX2}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def msign_times(count: int, n: int, m: int, seconds: float) -> dict[str, float]:
    """Seconds of the matrix sign of a stack, and of the float32 loop over it."""
    G = torch.randn(count, n, m, generator=torch.Generator().manual_seed(0))
    return timed({"quintic": lambda: msign(G), "float32 loop": lambda: [loop(g) for g in G]}, seconds)


def demo_share(preset: str, seconds: float) -> dict[str, Any]:
    """Seconds of the parts of a step of a preset at its batch, with the threads that a user has.

    The gradient is in whichever of float32 and (where it may be fast) bfloat16 is quicker.
    """
    import tomllib

    from quintic.assets import preset_text

    settings = tomllib.loads(preset_text("lm", preset))
    engine = settings["engine"]
    config = LMConfig(**{**settings["lm"], "vocab_size": LAPTOP_VOCABULARY})
    model = LanguageModel(config, seed=0)
    optimizer = Muon(model)
    cpu = torch.device("cpu")
    ids = torch.randint(
        config.vocab_size, (engine["batch_size"], config.context + 1), generator=torch.Generator().manual_seed(0)
    )

    def gradient(dtype: torch.dtype) -> None:
        optimizer.zero_grad()
        with autocast(cpu, dtype):
            logits = model(ids[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()

    dtypes = [torch.float32, *([torch.bfloat16] if matrix_units() else [])]
    times = timed({**{str(d): lambda d=d: gradient(d) for d in dtypes}, "optimizer": optimizer.step}, seconds)
    quickest = min(map(str, dtypes), key=lambda name: times[name])
    return {
        "batch": engine["batch_size"], "dtype": quickest.removeprefix("torch."), "gradient": times[quickest],
        "optimizer": times["optimizer"],
    }  # fmt: skip


def run(
    stacks: Sequence[tuple[int, int, int]] = STACKS,
    lists: dict[str, list[tuple[int, int]]] | None = None,
    preset: str = "laptop",
    seconds: float = SECONDS,
    limited: Sequence[str] = LIMITED,
) -> dict:
    device = pick_device("cpu")
    lists = lists or matrix_lists()
    threads = torch.get_num_threads()
    demo = demo_share(preset, seconds)
    with one_thread():
        steps = {name: step_times(shapes, seconds) for name, shapes in lists.items()}
        signs = {f"{count} x ({n}, {m})": msign_times(count, n, m, seconds / 3) for count, n, m in stacks}
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return {
        "machine": describe(device, pick_dtype("float32", device)),
        "avx2_steps": {name: limited_step_times(lists[name], seconds) for name in limited} if fast else {},
        "demo": {"threads": threads, **demo},
        "steps": steps,
        "msign": signs,
    }


def section(result: dict) -> str:
    m, demo = result["machine"], result["demo"]
    signs = [
        (title, _ms(times["quintic"]), _ms(times["float32 loop"]), f"{times['float32 loop'] / times['quintic']:.2f}")
        for title, times in result["msign"].items()
    ]
    share = demo["optimizer"] / (demo["optimizer"] + demo["gradient"])
    parts = [
        "## The time of a step of Muon",
        "`python -m benchmarks muon_speed`: medians of steps taken in turns within one process, one thread.\n"
        f"Machine: {m['cpu']}, torch {m['torch']}. quintic and the loop multiply in float32, the others in bfloat16.",
        _steps_table(result["steps"]),
        "The matrix sign alone:",
        table(("stack", "quintic, ms", "float32 loop, ms", "ratio"), signs),
    ]
    if result["avx2_steps"]:
        parts += [
            "All of them in a process that is limited to AVX2, where torch has no fast bfloat16:",
            _steps_table(result["avx2_steps"]),
        ]
    parts.append(
        f"In a step of the laptop preset (batch {demo['batch']}, {demo['threads']} threads, {demo['dtype']}) the "
        f"gradient takes\n{1000 * demo['gradient']:.0f} ms and the optimizer {1000 * demo['optimizer']:.0f} ms: "
        f"{share:.1%} of both. The share that a run reports, as in the table of the demo, is larger: it also "
        "holds clipping and balancing."
    )
    return "\n\n".join(parts)


def _steps_table(steps: dict[str, dict[str, float | None]]) -> str:
    names = list(next(iter(steps.values())))
    pairs = [("float32 loop", "quintic"), ("torch", "quintic")] + [("torch", BF16)] * (BF16 in names)
    rows = [
        (
            title,
            *(_ms(times[name]) for name in names),
            *(_ratio(times[a], times[b]) for a, b in pairs),
        )
        for title, times in steps.items()
    ]
    return table(("matrices", *(f"{name}, ms" for name in names), *(f"{a} / {b}" for a, b in pairs)), rows)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def _ms(seconds: float | None) -> str:
    return "fails" if seconds is None else f"{1000 * seconds:.1f}"


def claims(result: dict) -> list[Claim]:
    steps, signs, demo = result["steps"], result["msign"], result["demo"]
    share = demo["optimizer"] / (demo["optimizer"] + demo["gradient"])

    def ratio(times: dict[str, float], other: str, ours: str = "quintic") -> float:
        return times[other] / times[ours]

    found = [
        Claim(
            "Muon's share of a step of the laptop preset is at most 12 %, gradient and optimizer timed alone", "ours",
            f"{share:.1%}", 0, "yes" if share <= 0.12 else "no", "muon_speed",
        )
    ]  # fmt: skip
    for where, lists in (("limited to AVX2", result["avx2_steps"]), ("this processor as it is", steps)):
        if GPT_LIST in lists:
            times = ratio(lists[GPT_LIST], "torch")
            found.append(Claim(
                f"A step is at least 8 times as fast as torch's; {GPT_LIST}; {where}", "ours",
                f"{times:.1f} times", 0, "yes" if times >= 8 else "no", "muon_speed",
            ))  # fmt: skip
    if all(BF16 in times for times in steps.values()):
        slowest = min(steps, key=lambda title: ratio(steps[title], "torch", BF16))
        most = 1 / ratio(steps[slowest], "torch", BF16)
        found.append(Claim(
            "With ns_dtype=bfloat16 a step takes at most 1.3 times torch's where bfloat16 is fast", "ours",
            f"at worst {most:.2f} times ({slowest})", 0, "yes" if most <= 1.3 else "no", "muon_speed",
        ))  # fmt: skip
    slowest = min(steps, key=lambda title: ratio(steps[title], "float32 loop"))
    least = ratio(steps[slowest], "float32 loop")
    found.append(Claim(
        "A step takes at most 1.05 times a float32 loop's on every list of matrices", "ours",
        f"at worst {1 / least:.2f} times ({slowest})", 0, "yes" if least >= 1 / 1.05 else "no", "muon_speed",
    ))  # fmt: skip
    for peer in ("Keller's", "pytorch_optimizer", "heavyball"):
        ratios = [times[peer] / times["quintic"] for times in steps.values() if times.get(peer)]
        if ratios:
            whose = {"Keller's": "Keller's", "heavyball": "heavyball's, uncompiled"}.get(peer, f"{peer}'s")
            found.append(Claim(
                f"A step in float32 is quicker than {whose}, on every list of matrices", "ours",
                f"{statistics.median(ratios):.2f} times in the median, {min(ratios):.2f} at worst", 0,
                "yes" if min(ratios) > 1 else "no", "muon_speed",
            ))  # fmt: skip
    for title, bar in (("24 x (64, 64)", 1.5), ("12 x (64, 256)", 1.35), ("8 x (128, 512)", 1.35)):
        if title in signs:
            found.append(Claim(
                f"The matrix sign is at least {bar} times as fast as a float32 loop; {title}", "ours",
                f"{ratio(signs[title], 'float32 loop'):.2f} times", 0,
                "yes" if ratio(signs[title], "float32 loop") >= bar else "no", "muon_speed",
            ))  # fmt: skip
    return found


if __name__ == "__main__":
    with one_thread():
        print(json.dumps(step_times(json.loads(sys.argv[1]), float(sys.argv[2]))))
