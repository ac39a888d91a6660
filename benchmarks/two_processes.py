"""The same training by one process with all threads and by two that share them: what talking to each other costs.

``quintic train`` on the laptop preset with the same global batch, as a user would start it; the two share weights and
optimizer state (``engine.shards=2``) or hold copies (``engine.shards=1``). Runs take turns. Of each the median of the
later steps and the quickest: a step of two is slow when either core is, by whatever else the machine does, while one
process gives more work to the quicker core.
Two runs side by side that know nothing of each other, each on half of the batch, do all that two with copies do but
talk and wait: the difference is the share of communication.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import Claim, table
from quintic.cli.wiring import build_settings
from quintic.core.machine import describe

BAR = 1.25
ROUNDS, STEPS = 9, 30
WAYS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two, weights divided": (2, ["engine.shards=2"]),
    "two, weights copied": (2, ["engine.shards=1"]),
}
"""Title: processes, settings."""


ONE, COPIED, APART = "one process", "two, weights copied", "two side by side, half a batch each, without a word"


def milliseconds(
    processes: int, settings: list[str], steps: int, size: str = "laptop", *, apart: bool = False
) -> tuple[float, float]:
    """Median and least of a step over the later half of a run, of the slower one if they are runs of their own."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0"] if processes > 1 and not apart else []  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"run-{number}" for number in range(processes if apart else 1)]
        commands = [
            [
                sys.executable, *launcher, "-m", "quintic", "train", "--size", size, "--out", str(out),
                f"engine.steps={steps}", "engine.eval_every=0", "engine.sample_every=0", "engine.checkpoint_every=0",
                "engine.diagnose_every=0", *settings,
            ]
            for out in outs
        ]  # fmt: skip
        started = [subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL) for c in commands]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"training failed: {' '.join(commands[0])}")
        later = [later_steps((out / "metrics.jsonl").read_text()) for out in outs]
        return max(map(statistics.median, later)), max(map(min, later))


def later_steps(metrics: str) -> list[float]:
    """Milliseconds of each step of the later half.

    Example:
        >>> later_steps("".join('{"seconds": %d}\\n' % s for s in (9, 12, 14, 15, 17)))
        [1000.0, 2000.0]
    """
    rows = [json.loads(line) for line in metrics.splitlines()]
    times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(rows)]
    return [1e3 * time for time in times[len(times) // 2 :]]


def run(steps: int = STEPS, size: str = "laptop", rounds: int = ROUNDS) -> dict[str, Any]:
    half = build_settings("lm", size, [])["engine"].batch_size // 2
    found: dict[str, list[tuple[float, float]]] = {title: [] for title in (*WAYS, APART)}
    for turn in range(rounds):
        for title, (processes, settings) in WAYS.items():
            found[title].append(milliseconds(processes, settings, steps, size))
        found[APART].append(milliseconds(2, [f"engine.batch_size={half}"], steps, size, apart=True))
        print(turn, {title: round(spent[-1][0], 1) for title, spent in found.items()}, flush=True)
    return {
        "machine": describe(torch.device("cpu"), torch.float32),
        "size": size,
        "rounds": rounds,
        "step_ms": {title: [median for median, _ in spent] for title, spent in found.items()},
        "least_ms": {title: [least for _, least in spent] for title, spent in found.items()},
    }


def ratios(result: dict[str, Any], against: str = ONE) -> dict[str, float]:
    """Median over the rounds of each way against another in the same round."""
    times = result["step_ms"]
    return {
        title: statistics.median(mine / other for mine, other in zip(spent, times[against], strict=True))
        for title, spent in times.items()
    }


def least_ratios(result: dict[str, Any]) -> dict[str, float]:
    """The quickest step of all turns of each way against that of one process."""
    least = {title: min(spent) for title, spent in result["least_ms"].items()}
    return {title: mine / least[ONE] for title, mine in least.items()}


def communication(result: dict[str, Any]) -> float:
    """Part of a step of two with copies that goes to talking and waiting; noise can bring it below 0."""
    return 1.0 - ratios(result, COPIED)[APART]


def section(result: dict[str, Any]) -> str:
    m, ratio, least = result["machine"], ratios(result), least_ratios(result)
    rows = [
        (title, f"{statistics.median(spent):.0f}", f"{ratio[title]:.2f}", f"{min(result['least_ms'][title]):.0f}",
         f"{least[title]:.2f}")
        for title, spent in result["step_ms"].items()
    ]  # fmt: skip
    return "\n\n".join([
        "## One process and two",
        f"`python -m benchmarks two_processes`: the {result['size']} preset, the same global batch and the same cores; "
        f"the two communicate through gloo.\nMedians of {result['rounds']} turns. {m['cpu']}, {m['cpu_count']} cores, "
        f"torch {m['torch']}.",
        table(("processes", "step, ms", "ratio", "quickest step, ms", "ratio"), rows),
        f"With copied weights, communication and waiting take {communication(result):.0%} of a step: by so much the "
        "step is longer than that of two\nindependent runs side by side, each with half of the batch. A step of two is "
        "slow when either core is, as on a machine shared with\nothers; the quickest steps show what is left without.",
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    ratio = ratios(result)
    default = next(iter(title for title in WAYS if title != ONE))
    best = min((title for title in WAYS if title != ONE), key=lambda title: ratio[title])
    return [Claim(
        f"Two processes on the same cores take at most {BAR} times as long as one", "ours",
        f"{ratio[default]:.2f} times with divided weights, which is the default (quickest steps: "
        f"{least_ratios(result)[default]:.2f}); at best {ratio[best]:.2f} ({best})", 1,
        "yes" if ratio[default] <= BAR else "no", "two_processes",
    )]  # fmt: skip
