"""What ``make demo`` reaches: the laptop preset on the embedded corpus, over seeds.

Bits per byte on validation and test, time, memory, and whether the text it makes is made of the corpus' words without
being copied from it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SEEDS = (0, 1, 2)
FOLDER = Path("runs") / "benchmarks" / "demo"
"""Kept, so that a benchmark that was stopped goes on; delete it to measure again."""
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def share_of_known_words(text: str, corpus: str) -> float:
    """Part of the words of a text that occur in the corpus; a last word that was cut off is left out."""
    known = set(words(corpus))
    found = words(text.rsplit(maxsplit=1)[0])
    return sum(word in known for word in found) / max(1, len(found))


def longest_copied_run(text: str, corpus: str) -> int:
    """Length of the longest substring of a text that stands in the corpus, white space folded."""
    text, corpus = " ".join(text.split()), " ".join(corpus.split())
    best = start = 0
    for end in range(1, len(text) + 1):
        while text[start:end] not in corpus:
            start += 1
        best = max(best, end - start)
    return best


def quintic(*arguments: str) -> str:
    command = [sys.executable, "-m", "quintic", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def one(seed: int, folder: Path) -> dict[str, float]:
    from quintic.assets import corpus_path

    run = folder / f"seed-{seed}"
    clock = folder / f"seed-{seed}.seconds"
    if not clock.exists():  # else it was trained by a benchmark that was stopped later on
        shutil.rmtree(run, ignore_errors=True)
        started = time.perf_counter()
        quintic("train", "--size", "laptop", "--seed", str(seed), "--out", str(run))
        clock.write_text(str(time.perf_counter() - started))
    wall = float(clock.read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    test = quintic("evaluate", str(run))
    corpus = corpus_path().read_text(encoding="utf-8")
    texts = [
        quintic("generate", str(run), "--prompt", prompt, "--max-tokens", "400", "--seed", str(i))
        for i, prompt in enumerate(("Call me", "The whale", "In the morning"))
    ]
    machine = json.loads((run / "machine.json").read_text())
    late = rows[len(rows) // 2 :]
    return {
        "seed": seed,
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "val_bits_per_byte": rows[-1]["val_bits_per_byte"],
        "test_bits_per_byte": float(re.search(r"([\d.]+) bits per byte", test)[1]),
        "training_seconds": rows[-1]["seconds"],
        "wall_seconds": wall,
        "peak_memory_mb": machine["peak_memory_mb"],
        "optimizer_share": sum(row["optimizer_share"] for row in late) / len(late),
        "mfu": sum(row["mfu"] for row in late) / len(late),
        "max_vio": sum(sum(row["max_vio"]) / len(row["max_vio"]) for row in late) / len(late),
        "max_vio_floor": late[-1]["max_vio_floor"],
        "dead_experts": sum(row["dead_experts"] for row in late) / len(late),
        "known_words": min(share_of_known_words(text, corpus) for text in texts),
        "longest_copied_run": max(longest_copied_run(text, corpus) for text in texts),
    }


def run() -> dict:
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in SEEDS:
        rows.append(one(seed, FOLDER))
        print(json.dumps(rows[-1]), flush=True)
    machine = json.loads((FOLDER / f"seed-{SEEDS[0]}" / "machine.json").read_text())
    facts = json.loads((FOLDER / f"seed-{SEEDS[0]}" / "run.json").read_text())
    parameters = {name: facts[name] for name in ("parameters_total", "parameters_active")}
    return {"machine": machine, **parameters, "runs": rows}


def section(result: dict) -> str:
    m, runs = result["machine"], result["runs"]
    head = "seed | validation bits/byte | test bits/byte | wall time | peak memory | MFU | optimizer's share"
    head = f"| {head} | MaxVio (floor) | words known | longest copy |"
    lines = [
        "## The demo: laptop preset on Moby Dick",
        "",
        f"`python -m benchmarks demo`. {result['parameters_total']:,} parameters, {result['parameters_active']:,}",
        f"of them active for a token; {runs[0]['steps']} steps, {runs[0]['tokens']:,} tokens.",
        f"Machine: {m['cpu']}, {m['threads']} threads, {m['dtype']}, torch {m['torch']};",
        f"{m['matmul_gflops']:.0f} GFLOP/s measured in matrix products.",
        "",
        head,
        "|" + "---|" * head.count(" | ") + "---|",
    ]
    for r in runs:
        cells = (
            f"{r['seed']}",
            f"{r['val_bits_per_byte']:.3f}",
            f"{r['test_bits_per_byte']:.3f}",
            f"{r['wall_seconds']:.0f} s",
            f"{r['peak_memory_mb']:.0f} MiB",
            f"{r['mfu']:.0%}",
            f"{r['optimizer_share']:.0%}",
            f"{r['max_vio']:.2f} ({r['max_vio_floor']:.2f})",
            f"{r['known_words']:.1%}",
            f"{r['longest_copied_run']} characters",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Words known: the smallest share, over three generated texts of 400 tokens, of words that occur in the corpus.",
        "Longest copy: the longest run of characters of these texts that stands in the corpus. MaxVio is the mean over",
        "layers and the second half of the steps; the floor is what uniformly random routing would show.",
    ]
    return "\n".join(lines)
