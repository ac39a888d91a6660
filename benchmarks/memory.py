"""Peak memory: the loss over a large vocabulary, activation checkpointing of a language model and of a flow.

Each measurement is a process of its own (Linux): everything is made, the peak so far is forgotten, and a forward and a
backward pass tell how much more was needed for a time. The loss is that of 8,192 tokens, or of as many as have room
with whole logits.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.claims import Claim, table
from quintic.core.machine import describe, peak_memory_bytes
from quintic.flow import TarFlow
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.cross_entropy import linear_cross_entropy

CPU = torch.device("cpu")
VOCABULARY, WIDTH, TOKENS = 163_840, 64, 8192
"""The vocabulary is Moonlight's."""
_COPIES = 4
"""Whole logits, their log-softmax and gradients are in memory together; one more than was seen."""


def tokens_with_room(free: int, vocabulary: int = VOCABULARY, most: int = TOKENS) -> int:
    """The largest number of tokens, ``most`` or a half, a quarter ... of it, whose whole logits have room.

    Example:
        >>> tokens_with_room(24 * 2**30), tokens_with_room(12 * 2**30)
        (8192, 4096)
    """
    while most > 1 and _COPIES * 4 * most * vocabulary > free:
        most //= 2
    return most


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def loss_over_vocabulary(chunked: bool, tokens: int) -> Callable[[int], object]:
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    w = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
    targets = torch.randint(VOCABULARY, (tokens,))

    def act(rows: int) -> None:
        h, y = x[:rows], targets[:rows]
        total = linear_cross_entropy(h, w, y) if chunked else F.cross_entropy(h @ w.t(), y, reduction="sum")
        total.backward()

    return act


def language_model(checkpoint: bool, windows: int) -> Callable[[int], object]:
    config = LMConfig(vocab_size=264, context=256, d_model=128, num_layers=16, checkpoint=checkpoint)
    model = LanguageModel(config, seed=0).train()
    ids = torch.randint(264, (windows, 257))
    return with_gradients(model, lambda rows: model(ids[:rows, :-1], targets=ids[:rows, 1:]))


def flow(checkpoint: bool, pictures: int) -> Callable[[int], object]:
    model = TarFlow((1, 28, 28), patch=2, width=128, blocks=4, layers=4, checkpoint=checkpoint, seed=0).train()
    x = torch.randn(pictures, 1, 28, 28)
    return with_gradients(model, lambda rows: -model.log_prob(x[:rows]).sum())


def with_gradients(model: torch.nn.Module, loss: Callable[[int], torch.Tensor]) -> Callable[[int], object]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return lambda rows: loss(rows).backward()


class Case(NamedTuple):
    """What is measured."""

    title: str
    make: Callable[[bool, int], Callable[[int], object]]
    """Given whether to save memory and how many rows there are: a pass over the first of them."""
    rows: int
    plain: str
    saving: str


CASES = {
    "loss": Case(
        f"loss over a vocabulary of {VOCABULARY:,}", loss_over_vocabulary, TOKENS, "whole logits", "in chunks"
    ),
    "lm": Case(
        "language model of 16 blocks, 16 x 256 tokens", language_model, 16, "all activations", "inputs of blocks"
    ),
    "flow": Case(
        "TARFLOW of 4 blocks of 4 layers, 16 pictures of 28 x 28", flow, 16, "all activations", "inputs of blocks"
    ),
}


def _peak(name: str, saving: bool, rows: int, answer: Any) -> None:
    act = CASES[name].make(saving, rows)
    act(1)  # what is loaded and laid out at first use does not count
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_bytes(CPU) or 0
    act(rows)
    answer.send(((peak_memory_bytes(CPU) or 0) - before) / 2**20)


def mebibytes(name: str, saving: bool, rows: int) -> float:
    """MiB that a case needs for a time."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(name, saving, rows, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def run(most: int = TOKENS) -> dict[str, Any]:
    tokens = tokens_with_room(free_bytes(), most=most)
    rows = {name: case.rows for name, case in CASES.items()} | {"loss": tokens}
    found = {name: {str(saving): mebibytes(name, saving, rows[name]) for saving in (False, True)} for name in CASES}
    return {"machine": describe(CPU, torch.float32), "tokens": tokens, "mib": found}


def section(result: dict[str, Any]) -> str:
    m = result["machine"]
    rows = []
    for name, mib in result["mib"].items():
        case = CASES[name]
        ratio = mib["False"] / mib["True"]
        rows.append((
            case.title, f"{case.plain}: {mib['False']:,.0f}", f"{case.saving}: {mib['True']:,.0f}", f"{ratio:.1f}"
        ))  # fmt: skip
    return "\n\n".join([
        "## Memory",
        "`python -m benchmarks memory`: peak memory, in MiB, of a forward and a backward pass beyond weights and "
        f"gradients, each in a process\nof its own; the loss is that of {result['tokens']:,} tokens of width {WIDTH}. "
        f"{m['cpu']}, torch {m['torch']}.",
        table(("what", "plain, MiB", "saving, MiB", "ratio"), rows),
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    mib = result["mib"]["loss"]
    logits = result["tokens"] * VOCABULARY * 4 / 2**20
    return [Claim(
        f"The logits of a vocabulary of {VOCABULARY:,} are never whole in memory", "ours",
        f"{mib['True']:,.0f} MiB; the logits alone would be {logits:,.0f}, the usual loss takes {mib['False']:,.0f}", 0,
        "yes" if mib["True"] < 0.5 * logits else "no", "memory",
    )]  # fmt: skip
