"""``torch.compile`` of a block, for training only.

All layers of one kind (dense, experts) share one compiled graph, since their weights are inputs of it; a change of load
compiles nothing again. Evaluation and generation run uncompiled: their shapes vary from call to call, and hooks that
record the routing would not be seen by a graph that was compiled before.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from quintic.core import ConfigError

__all__ = ["compiled"]

BACKEND: str | Callable[..., Any] = "inductor"
_VARIANTS = 32  # kinds of block, with and without masks, and a last micro-batch of another size


@functools.cache
def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function, compiled when it is first called; the same object for the same arguments.

    Args:
        function: Of a module and tensors; not a method, so that modules share what is compiled.
        device: Where its tensors are.

    Raises:
        ConfigError: Code for a CPU needs a C++ compiler, and none is found.
    """
    if device.type == "cpu" and BACKEND == "inductor":
        name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(name) is None:
            raise ConfigError(
                f"lm.compile needs a C++ compiler to train on a CPU, and there is no {name!r} on the path; install "
                "one, name it in the environment variable CXX, or leave lm.compile=false"
            )
    # torch's overloads for type checkers lack the limit.
    return torch.compile(function, fullgraph=True, backend=BACKEND, recompile_limit=_VARIANTS)  # pyright: ignore[reportCallIssue]
