"""``quintic doctor``: what this machine has, and what Quintic will do with it."""

from __future__ import annotations

import json
import os
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quintic.cli.printing import say

__all__ = ["doctor"]

_NEEDED = ("quintic", "torch", "numpy", "tokenizers", "safetensors")
_EXTRAS = ("transformers", "diffusers", "tensorboard", "wandb", "trackio")


def doctor(
    *,
    device: str = "auto",
    dtype: str = "auto",
    remeasure: bool = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show versions, cores, fast precisions, the measured speed of the matrix product, and the cache.

    Parameters
    ----------
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        Precision to measure: auto, float32, bfloat16 or float64.
    remeasure
        Measure again instead of using the cached figure.
    as_json
        Print everything as one JSON object.

    Examples
    --------
    quintic doctor
    quintic doctor --dtype bfloat16 --remeasure
    quintic doctor --json
    """
    from quintic.core.machine import describe, fast_dtype, matmul_peak, pick_device, pick_dtype

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    facts = {
        "versions": _versions(),
        **describe(where, kind),
        "memory_bytes": _memory(),
        "fastest_safe_dtype": str(fast_dtype(where)).removeprefix("torch."),
        "matmul_gflops": round(matmul_peak(where, kind, remeasure=remeasure) / 1e9, 1),
        "cache": _cache(),
    }
    if as_json:
        say(json.dumps(facts, indent=1))
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    cache, memory = facts["cache"], facts["memory_bytes"]
    rows = [(name, found or "not installed (optional)") for name, found in facts["versions"].items()]
    rows += [
        ("python", facts["python"]),
        ("system", facts["platform"]),
        ("processor", facts["cpu"]),
        ("cores", f"{facts['cpu_count']}; torch uses {facts['threads']} thread{'s' * (facts['threads'] != 1)}"),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:,.1f} GiB"),
        ("device", facts["device"]),
        ("instructions", facts["instructions"]),
        *([("kernels", facts["kernels"])] if "kernels" in facts else []),
        ("dtype", f"{facts['dtype']}; the fastest that is safe to train in here is {facts['fastest_safe_dtype']}"),
        ("matrix product", f"{facts['matmul_gflops']:,.0f} GFLOP/s in {facts['dtype']} (measured)"),
        ("cache", f"{cache['bytes'] / 2**20:,.1f} MiB in {cache['files']} files; QUINTIC_CACHE moves it"),
        ("", f"always safe to delete: {cache['clear']}"),
    ]
    for name, words in rows:
        say(f"{name:<15} {words}")


def _versions() -> dict[str, str | None]:
    """Of this package, of what it needs and of what it can use; None for what is not there."""
    found: dict[str, str | None] = {}
    for name in (*_NEEDED, *_EXTRAS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _memory() -> int | None:
    """Bytes of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cache() -> dict[str, Any]:
    from quintic.core.files import cache_dir

    folder = cache_dir()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"folder": str(folder), "bytes": sum(sizes), "files": len(sizes), "clear": _removal(folder)}


def _removal(folder: Path) -> str:
    """The command that deletes a folder."""
    return f'rmdir /s /q "{folder}"' if os.name == "nt" else f"rm -r {shlex.quote(str(folder))}"
