"""The routing of a forward pass, kept for its recomputation in the backward pass.

Activation checkpointing runs the forward pass again. Where two scores are nearly equal, a recomputed score may differ
in its last bit and send the token elsewhere: the gradient would then be that of another function, or the checkpoint
would notice changed shapes and stop. So the first decision is kept and used again.

Selective checkpointing finds what it saved of an operator by how many of its kind went before, so a recomputation may
call no operator that the first pass did not call, nor leave one out that it still needs. What only one of the passes
does is therefore inside of an operator of this package's own: torch sees the one, and not those in it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque

import torch
from torch import Tensor

from quintic.core.operators import operator

__all__ = ["KeptRouting", "in_backward"]

_MICRO_BATCHES = 64  # kept at most, for a loop that never calls balance_step
_SAME = 0.5


def in_backward() -> bool:
    """Whether this forward pass runs inside a backward pass: a recomputation. A compiled one finds out when it runs."""
    if torch.compiler.is_compiling():
        return False
    # A private name: torch has no public one for this (2.13), and its own checkpoints ask in the same way.
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is None:
        _tell()
        return False
    return task() != -1


@functools.cache
def _tell() -> None:
    warnings.warn(
        "this version of torch does not tell a forward pass that activation checkpointing runs again from a first one: "
        "with checkpoints the load of experts would be counted twice, and routing not be kept; train without them, or "
        "with a version that quintic was tested with",
        stacklevel=2,
    )


class KeptRouting:
    """Decisions of one layer since the last optimizer step.

    A recomputation is matched to the decision that agrees with it most, so the order of backward passes does not
    matter; one that agrees with none (less than half) is new and stays as it is.
    """

    def __init__(self) -> None:
        self._kept: deque[Tensor] = deque(maxlen=_MICRO_BATCHES)

    def __call__(self, ids_nk: Tensor) -> Tensor:
        """The decision to use: these ids, or in a recomputation those of the first time."""
        if torch.compiler.is_compiling():  # a compiled graph decides itself what it keeps
            return ids_nk
        again = in_backward()
        like = [kept for kept in self._kept if kept.shape == ids_nk.shape and kept.device == ids_nk.device]
        ids_nk = _kept(ids_nk, like if again else [])
        if not again:
            self._kept.append(ids_nk)
        return ids_nk

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def _kept_routing(ids_nk: Tensor, kept: list[Tensor]) -> Tensor:
    found_nk, most = ids_nk.clone(), ids_nk.new_full((), math.ceil(_SAME * ids_nk.numel()) - 1)
    for each in kept:  # without a question to the device, for which the host would wait
        same = (each == ids_nk).sum()
        found_nk = torch.where(same > most, each, found_nk)
        most = torch.maximum(same, most)
    return found_nk


_kept = operator(
    "kept_routing(Tensor ids, Tensor[] kept) -> Tensor", _kept_routing, lambda ids, kept: torch.empty_like(ids)
)
