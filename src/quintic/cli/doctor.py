"""``quintic doctor``: what this machine has, and what Quintic will do with it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["doctor"]


def doctor(*, device: str = "auto", dtype: str = "auto", remeasure: bool = False) -> None:
    """Show device, precision, measured speed of the matrix product, and where the cache is.

    Parameters
    ----------
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        auto, float32, bfloat16 or float64.
    remeasure
        Measure again instead of using the cached figure.
    """
    import quintic
    from quintic.core.files import cache_dir
    from quintic.core.machine import describe, matmul_peak, pick_device, pick_dtype

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    facts = {"quintic": quintic.__version__, **describe(where, kind)}
    facts["matrix product"] = f"{matmul_peak(where, kind, remeasure=remeasure) / 1e9:,.0f} GFLOP/s (measured)"
    facts["cache"] = f"{cache_dir()} (safe to delete; QUINTIC_CACHE moves it)"
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console().print(table)
