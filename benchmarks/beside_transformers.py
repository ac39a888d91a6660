"""Generation and a training step beside transformers' DeepSeek-V3: same weights, same machine, one run, in turns.

The laptop preset, exported as ``quintic export`` does and loaded by ``AutoModelForCausalLM``. Greedy texts must be
equal, and losses to 1e-4, before anything is timed. A training step is forward, backward and AdamW (torch's fused
one, which transformers' Trainer takes, the same for both), in every way that transformers has of running experts;
memory is the peak of a process of its own, from which everything that is free was given back before, so that nothing
is hidden in the heap of the step before.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, table
from benchmarks.moe_speed import by_torch
from quintic.core.machine import describe, peak_memory_bytes
from quintic.lm import LanguageModel, LMConfig, generate_batch, load_deepseek, save_deepseek

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""transformers' ways of running experts."""
BY_TORCH = "quintic without kernels"
"""Ours by torch's operators, as where there is no C compiler."""
BATCHES = (1, 8)
CPU = torch.device("cpu")
PROMPT, NEW = 32, 160
TRAIN_BATCH = 16
ROUNDS, STEP_ROUNDS = 5, 40
_HOPELESS = 10.0
"""Who takes this many times as long as ours is timed by one step."""


def exported(folder: Path) -> LanguageModel:
    """Our model, and its folder for transformers."""
    model = LanguageModel(LMConfig.preset("laptop"), seed=0)
    with torch.no_grad():
        # A fresh head is nearly indifferent: rounding would choose the text.
        model.head.weight.mul_(30.0)
    save_deepseek(model, folder)
    return model


def theirs(folder: Path, experts: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)


def prompts(batch: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0))


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Smallest of some times each, in seconds; one call of each before."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for act in contestants.values():
        act()
    for _ in range(rounds):
        for name, act in contestants.items():
            began = time.perf_counter()
            act()
            spent[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in spent.items()}


def generation(folder: Path, ours: LanguageModel) -> dict[str, dict[str, float]]:
    """Tokens a second by batch, greedy, with caches."""
    peers = {name: theirs(folder, name).eval() for name in EXPERTS}
    found = {}
    for batch in BATCHES:
        ids = prompts(batch, ours.config.vocab_size)

        def here(ids: Tensor = ids) -> list[list[int]]:
            return generate_batch(ours, ids.tolist(), max_tokens=NEW, temperature=0.0, top_p=1.0)

        def there(name: str, ids: Tensor = ids) -> list[list[int]]:
            out = peers[name].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            return out[:, PROMPT:].tolist()

        text = here()
        for name in EXPERTS:
            assert there(name) == text, f"{name} writes another text"
        seconds = in_turns({"quintic": here, **{name: lambda name=name: there(name) for name in EXPERTS}})
        found[str(batch)] = {name: batch * NEW / spent for name, spent in seconds.items()}
        print(batch, found[str(batch)], flush=True)
    return found


def stepper(model: nn.Module, ours: bool) -> Callable[[], float]:
    """A training step on fixed random tokens, for the model of either side; returns the loss."""
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (TRAIN_BATCH, 257), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        if ours:
            loss = model(ids[:, :-1], targets=ids[:, 1:]) / ids[:, 1:].numel()
        else:
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def training(folder: Path) -> dict[str, float]:
    """Seconds of a step."""
    steps = {"quintic": stepper(load_deepseek(folder), True)}
    steps[BY_TORCH] = by_torch(stepper(load_deepseek(folder), True))
    steps |= {name: stepper(theirs(folder, name), False) for name in EXPERTS}
    losses = {name: step() for name, step in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4 * losses["quintic"], losses
    once = in_turns(steps, rounds=1)
    slow = {name: spent for name, spent in once.items() if spent > _HOPELESS * once["quintic"]}
    quick = {name: step for name, step in steps.items() if name not in slow}
    return slow | in_turns(quick, rounds=STEP_ROUNDS)


def _peak(folder: str, name: str, answer: Any) -> None:
    if name == BY_TORCH:
        os.environ["QUINTIC_KERNELS"] = "torch"
    ours = name in ("quintic", BY_TORCH)
    step = stepper(load_deepseek(folder), True) if ours else stepper(theirs(Path(folder), name), False)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of glibc
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which is that of loading, is forgotten (Linux)
    before = peak_memory_bytes(CPU) or 0
    step()
    answer.send(((peak_memory_bytes(CPU) or 0) - before) / 2**20)


def memory(folder: Path) -> dict[str, float]:
    """MiB that a step needs for a time, beside weights, gradients and the state of the optimizer."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name in ("quintic", BY_TORCH, *EXPERTS):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(str(folder), name, send))
        process.start()
        process.join()
        found[name] = receive.recv()
    return found


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        ours = exported(folder)
        spent = training(folder)
        return {
            "machine": describe(CPU, torch.float32),
            "tokens_per_second": generation(folder, ours.eval()),
            "step_ms": {name: 1e3 * spent[name] for name in ("quintic", BY_TORCH, *EXPERTS)},
            "step_mib": memory(folder),
        }


def section(result: dict[str, Any]) -> str:
    speed, step, mib, m = result["tokens_per_second"], result["step_ms"], result["step_mib"], result["machine"]
    rows = [
        (f"transformers, {name}" if name in EXPERTS else name,
         *(f"{speed[str(b)][name]:,.0f}" if name in speed[str(b)] else "" for b in BATCHES),
         f"{step[name]:.0f}", f"{mib[name]:.0f}")
        for name in step
    ]  # fmt: skip
    head = ("model", *(f"tokens a second, batch {b}" for b in BATCHES), "training step, ms", "its memory, MiB")
    return "\n\n".join([
        "## Beside transformers' DeepSeek-V3",
        "`python -m benchmarks beside_transformers`: the laptop preset, the same weights and equal results; greedy, "
        f"{NEW} new tokens,\nsmallest of {ROUNDS} times in turns; a step is {TRAIN_BATCH} x 256 tokens with torch's "
        f"fused AdamW for both, smallest of {STEP_ROUNDS}.\n"
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}; kernels: {m.get('kernels', 'torch')}.",
        table(head, rows),
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    step, mib, made = result["step_ms"], result["step_mib"], []

    def claim(words: str, ratio: float, bar: float) -> None:
        made.append(Claim(words, "ours", f"{ratio:.2f} times", 1, "yes" if ratio >= bar else "no",
                          "beside_transformers"))  # fmt: skip

    for batch, speed in result["tokens_per_second"].items():
        best = max(speed[name] for name in EXPERTS)
        claim(f"Generation, batch {batch}: twice as fast as transformers at its best", speed["quintic"] / best, 2.0)
    claim("A training step is twice as fast as with transformers' eager experts", step["eager"] / step["quintic"], 2.0)
    best = min(step[name] for name in EXPERTS)
    claim("A training step is 1.2 times as fast as with transformers' best experts", best / step["quintic"], 1.2)
    least = min(mib[name] for name in EXPERTS)
    claim("A training step takes no more memory than transformers' least", least / mib["quintic"], 1.0)
    return made
