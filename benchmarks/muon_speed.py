"""How long a step of Muon takes: here, in torch as shipped, in a plain float32 loop, and in other packages.

torch's, Keller's and pytorch_optimizer's Muon multiply in bfloat16 whatever the processor; the loop is torch's method
in float32, one matrix after the other, which is the honest bar on a processor without fast bfloat16. All take their
steps in turns within one process, one thread each, and medians are compared. Expert stacks are given to all as single
matrices, which is the same work. heavyball runs uncompiled: to compile takes it minutes for each list of shapes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, table
from benchmarks.study import one_thread
from quintic.linalg import msign
from quintic.lm import LanguageModel, LMConfig
from quintic.optim import Muon

STACKS = ((24, 64, 64), (24, 128, 128), (12, 256, 256), (12, 64, 256), (8, 128, 512))
"""(matrices, rows, columns)."""
SECONDS = 12.0
"""For each list of matrices; three rounds at least."""
LAPTOP_VOCABULARY = 1088  # what the embedded corpus gets


def matrix_lists() -> dict[str, list[tuple[int, int]]]:
    """Shapes by name: the stacks, a GPT of 12 layers and width 128, and the laptop preset's matrices."""
    lists = {f"{count} x ({n}, {m})": [(n, m)] * count for count, n, m in STACKS}
    lists["GPT, 12 layers, width 128"] = ([(128, 128)] * 4 + [(512, 128), (128, 512)]) * 12
    laptop = LanguageModel(LMConfig.preset("laptop"), seed=None)
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


def msign_times(count: int, n: int, m: int, seconds: float) -> dict[str, float]:
    """Seconds of the matrix sign of a stack, and of the float32 loop over it."""
    G = torch.randn(count, n, m, generator=torch.Generator().manual_seed(0))
    return timed({"quintic": lambda: msign(G), "float32 loop": lambda: [loop(g) for g in G]}, seconds)


def demo_share(preset: str, seconds: float) -> dict[str, float]:
    """Seconds of the parts of a step of a preset at its batch, with the threads that a user has."""
    import tomllib

    from quintic.assets import preset_text

    settings = tomllib.loads(preset_text("lm", preset))
    engine = settings["engine"]
    config = LMConfig(**{**settings["lm"], "vocab_size": LAPTOP_VOCABULARY})
    model = LanguageModel(config)
    optimizer = Muon(model)
    ids = torch.randint(
        config.vocab_size, (engine["batch_size"], config.context + 1), generator=torch.Generator().manual_seed(0)
    )

    def gradient() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()

    return {"batch": engine["batch_size"], **timed({"gradient": gradient, "optimizer": optimizer.step}, seconds)}


def run(
    stacks: Sequence[tuple[int, int, int]] = STACKS,
    lists: dict[str, list[tuple[int, int]]] | None = None,
    preset: str = "laptop",
    seconds: float = SECONDS,
) -> dict:
    from quintic.core.machine import describe, fast_dtype, pick_device, pick_dtype

    device = pick_device("cpu")
    threads = torch.get_num_threads()
    demo = demo_share(preset, seconds)
    with one_thread():
        steps = {name: step_times(shapes, seconds) for name, shapes in (lists or matrix_lists()).items()}
        signs = {f"{count} x ({n}, {m})": msign_times(count, n, m, seconds / 3) for count, n, m in stacks}
    return {
        "machine": describe(device, pick_dtype("float32", device)),
        "msign_dtype": str(fast_dtype(device)).removeprefix("torch."),
        "demo": {"threads": threads, **demo},
        "steps": steps,
        "msign": signs,
    }


def section(result: dict) -> str:
    m, demo = result["machine"], result["demo"]
    names = list(next(iter(result["steps"].values())))
    steps = []
    for title, times in result["steps"].items():
        ratios = (f"{times[n] / times['quintic']:.2f}" if times[n] else "" for n in ("float32 loop", "torch"))
        steps.append((title, *(_ms(times[name]) for name in names), *ratios))
    signs = [
        (title, _ms(times["quintic"]), _ms(times["float32 loop"]), f"{times['float32 loop'] / times['quintic']:.2f}")
        for title, times in result["msign"].items()
    ]
    share = demo["optimizer"] / (demo["optimizer"] + demo["gradient"])
    return "\n\n".join([
        "## The time of a step of Muon",
        "`python -m benchmarks muon_speed`: medians of steps taken in turns within one process, one thread.\n"
        f"Machine: {m['cpu']}, torch {m['torch']}; the matrix sign is computed in {result['msign_dtype']} here.",
        table(("matrices", *(f"{name}, ms" for name in names), "loop / quintic", "torch / quintic"), steps),
        "The matrix sign alone:",
        table(("stack", "quintic, ms", "float32 loop, ms", "ratio"), signs),
        f"In a step of the laptop preset (batch {demo['batch']}, {demo['threads']} threads) the gradient takes "
        f"{1000 * demo['gradient']:.0f} ms and\nthe optimizer {1000 * demo['optimizer']:.0f} ms: {share:.1%} of both.",
    ])  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "fails" if seconds is None else f"{1000 * seconds:.1f}"


def claims(result: dict) -> list[Claim]:
    steps, signs, demo = result["steps"], result["msign"], result["demo"]
    share = demo["optimizer"] / (demo["optimizer"] + demo["gradient"])

    def ratio(times: dict[str, float], other: str) -> float:
        return times[other] / times["quintic"]

    found = [
        Claim(
            "Muon's share of a step of the laptop preset is at most 12 %", "quintic", f"{share:.1%}", 0,
            "yes" if share <= 0.12 else "no", "muon_speed",
        )
    ]  # fmt: skip
    gpt = "GPT, 12 layers, width 128"
    if gpt in steps:
        found.append(Claim(
            f"A step is at least 8 times as fast as torch's; {gpt}", "quintic",
            f"{ratio(steps[gpt], 'torch'):.1f} times", 0, "yes" if ratio(steps[gpt], "torch") >= 8 else "no",
            "muon_speed",
        ))  # fmt: skip
    slowest = min(steps, key=lambda title: ratio(steps[title], "float32 loop"))
    least = ratio(steps[slowest], "float32 loop")
    found.append(Claim(
        "A step takes at most 1.05 times a float32 loop's on every list of matrices", "quintic",
        f"at worst {1 / least:.2f} times ({slowest})", 0, "yes" if least >= 1 / 1.05 else "no", "muon_speed",
    ))  # fmt: skip
    for title, bar in (("24 x (64, 64)", 1.5), ("12 x (64, 256)", 1.35), ("8 x (128, 512)", 1.35)):
        if title in signs:
            found.append(Claim(
                f"The matrix sign is at least {bar} times as fast as a float32 loop; {title}", "quintic",
                f"{ratio(signs[title], 'float32 loop'):.2f} times", 0,
                "yes" if ratio(signs[title], "float32 loop") >= bar else "no", "muon_speed",
            ))  # fmt: skip
    return found
