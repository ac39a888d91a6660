"""Modules that are computed together with what stands around them, unless somebody watches one of them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["added", "hooked"]


def hooked(*modules: nn.Module) -> bool:
    """Whether a module has hooks, which want to see what it is given and what it makes: then it is called by itself."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def added(to: Tensor | None, module: nn.Module, *arguments: Any) -> Tensor:
    """``to + module(*arguments)``; a module that takes ``plus``, and that nobody watches, adds it itself.

    Args:
        to: Of the shape of the module's output; None is 0.
        module: Any.
        arguments: What it is given.
    """
    if to is None:
        return module(*arguments)
    if torch.compiler.is_compiling() or hooked(module) or not _takes_plus(type(module)):
        return to + module(*arguments)
    return module(*arguments, plus=to)


@functools.cache
def _takes_plus(kind: type[nn.Module]) -> bool:
    return "plus" in inspect.signature(kind.forward).parameters
