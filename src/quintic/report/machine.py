"""The machine that numbers were measured on, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quintic.report.html import table
from quintic.report.words import plain

__all__ = ["machine_table"]

_WORDS = {
    "cpu": ("Processor", "{}"),
    "instructions": ("Matrix units", "{}"),
    "kernels": ("Kernels", "{}"),
    "threads": ("Threads", "{}"),
    "device": ("Device", "{}"),
    "dtype": ("Precision", "{}"),
    "matmul_gflops": ("Matrix product", "{} GFLOP/s, measured"),
    "peak_memory_mb": ("Peak memory", "{} MiB"),
    "platform": ("System", "{}"),
    "python": ("Python", "{}"),
    "torch": ("PyTorch", "{}"),
}


def machine_table(facts: Mapping[str, Any]) -> str:
    """HTML of a heading and what ``machine.json`` holds; empty without facts."""
    rows = [
        (label, form.format(plain(facts[key]))) for key, (label, form) in _WORDS.items() if facts.get(key) is not None
    ]
    return f"<div><h3>Machine</h3>{table(rows)}</div>" if rows else ""
