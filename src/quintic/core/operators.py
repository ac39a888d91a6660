"""Operators of this package: for torch's dispatcher where somebody watches it, plain functions where nobody does.

``torch.compile``, activation checkpointing with a policy, counters of FLOPs, fake tensors and the profiler see each
operator as one.
Else the function is called at once: the way through the dispatcher and back takes longer than some kernels, above all
when the code for it has left the cache, as it has after every pass over a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["operator"]

_PLAIN = (Tensor, torch.nn.Parameter)
# Private names: torch has no public ones for this (2.13). Without them everything goes through the dispatcher.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)


def operator(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[..., Any]:
    """Register ``quintic::NAME``.

    Args:
        schema: ``NAME(Tensor x, ...) -> ...`` in torch's language.
        function: What it computes, on tensors without graph.
        fake: The same for shapes alone.
        flops: Its count, from shapes in the place of tensors; None counts nothing.

    Returns:
        The function to call.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"quintic::{name}", schema.removeprefix(name))
    torch.library.impl(f"quintic::{name}", "default", function)
    torch.library.register_fake(f"quintic::{name}", fake)
    registered = getattr(torch.ops.quintic, name)
    if flops is not None:
        register_flop_formula(registered)(lambda *shapes, out_shape=None, **_: flops(*shapes))
    through_dispatcher = registered.default

    def call(*arguments: Any) -> Any:
        watched = torch.compiler.is_compiling() or _modes() or _profiling()
        if watched or any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in arguments):
            return through_dispatcher(*arguments)
        return function(*arguments)

    return call
