"""The routing of a forward pass, kept for its recomputation in the backward pass.

Activation checkpointing runs the forward pass again. Where two scores are nearly equal, a recomputed score may differ
in its last bit and send the token elsewhere: the gradient would then be that of another function, or the checkpoint
would notice changed shapes and stop. So the first decision is kept and used again.
"""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = ["KeptRouting", "if_first", "in_backward", "unseen"]

_MICRO_BATCHES = 64  # kept at most, for a loop that never calls balance_step
_SAME = 0.5


def in_backward() -> bool:
    """Whether this forward pass runs inside a backward pass: a recomputation. A compiled one finds out when it runs."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def if_first(count: Tensor) -> Tensor:
    """The count; zeros if a compiled graph, which could not ask :func:`in_backward`, finds that it recomputes."""
    return _if_first(count) if torch.compiler.is_compiling() else count


@torch.library.custom_op("quintic::if_first", mutates_args=())
def _if_first(count: Tensor) -> Tensor:
    return count * (torch._C._current_graph_task_id() == -1)


_if_first.register_fake(torch.empty_like)


def unseen() -> contextlib.AbstractContextManager[object]:
    """For what one of the two passes does alone.

    Selective checkpointing finds the result of an operator by how many of its kind went before, so it must not see any
    that the other pass does not have.
    """
    if not torch.compiler.is_compiling():
        modes = dispatch._get_current_dispatch_mode_stack()
        if any(isinstance(mode, (_CachedTorchDispatchMode, _CachingTorchDispatchMode)) for mode in modes):
            return dispatch._disable_current_modes()
    return contextlib.nullcontext()


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
        if not in_backward():
            self._kept.append(ids_nk)
            return ids_nk
        like = [kept for kept in self._kept if kept.shape == ids_nk.shape and kept.device == ids_nk.device]
        if not like or not ids_nk.numel():
            return ids_nk
        with unseen():
            agreement = [float((kept == ids_nk).double().mean()) for kept in like]
        best = max(range(len(like)), key=agreement.__getitem__)
        return like[best] if agreement[best] >= _SAME else ids_nk

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
