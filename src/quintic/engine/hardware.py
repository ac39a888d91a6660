"""What a run is computed on: agreed among the ranks, and compared with what it was computed on before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quintic.core.machine import fast_dtype, pick_dtype
from quintic.core.ranks import Ranks

__all__ = ["agreed_dtype", "changes"]

_DECISIVE = ("cpu", "device", "dtype", "threads", "torch", "ranks", "kernels")
"""Facts on which the last bits of a training depend."""
_UNSAID = {"ranks": 1, "kernels": "torch"}
"""What holds where a record says nothing."""


def agreed_dtype(name: str, before: Mapping[str, Any], device: torch.device, ranks: Ranks) -> torch.dtype:
    """Dtype of matrix products, the same on all ranks: the main one decides.

    Args:
        name: As set. ``auto`` is what the run was computed in so far, else the fastest safe one.
        before: Facts of the machine that trained so far; empty if there was none.
        device: Of this rank.
        ranks: All of them call this.
    """
    own = pick_dtype(before.get("dtype", name) if name == "auto" else name, device)
    return ranks.gather(own)[0]


def changes(before: Mapping[str, Any], now: Mapping[str, Any], device: torch.device) -> list[str]:
    """What a person should know when another machine goes on with a run.

    Args:
        before: Facts of the machine that trained so far, see :func:`quintic.core.machine.describe`; empty if unknown.
        now: Facts of this one.
        device: Of this one.

    Example:
        >>> changes({"threads": 2, "torch": "2.13.0"}, {"threads": 1, "torch": "2.13.0"}, torch.device("cpu"))
        ['threads was 2 and is 1 now: the run goes on, equal to rounding rather than bit for bit']
    """
    pairs = [(name, *(facts.get(name, _UNSAID.get(name)) for facts in (before, now))) for name in _DECISIVE if before]
    found = [f"{name} was {old} and is {new} now" for name, old, new in pairs if _deed(old) != _deed(new)]
    words = [f"{', '.join(found)}: the run goes on, equal to rounding rather than bit for bit"] if found else []
    if now.get("dtype") == "bfloat16" and fast_dtype(device) != torch.bfloat16:
        words.append("the run computes in bfloat16, which is slow here; it keeps to it, since that is its precision")
    return words


def _deed(fact: object) -> object:
    """Without the reason that stands behind it in brackets."""
    return fact.split(" (")[0] if isinstance(fact, str) and fact.startswith("torch (") else fact
