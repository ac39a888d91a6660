"""The AdamW half: torch's own fused AdamW, with float32 state whatever the parameters' dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quintic.optim.sharded import local

__all__ = ["new_state", "state_dtype", "update_with_adamw"]

_WIDE = (torch.float32, torch.float64)


def update_with_adamw(group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], bad: Tensor) -> None:
    """One step, over float32 copies of what is not float32 or not contiguous.

    Args:
        group: lr, weight_decay, adamw_betas, adamw_eps and maximize.
        params: Parameters with gradients.
        states: Of each, ``step``, ``exp_avg`` and ``exp_avg_sq``; made where missing.
        bad: 0-d bool that turns this into no step, without being read.
    """
    own, targets, gradients, first, second, steps = [], [], [], [], [], []
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        dtype = state_dtype(p.dtype)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = new_state(p)
            state["exp_avg_sq"] = new_state(p)
        own.append(local(p))
        targets.append(own[-1].to(dtype).contiguous())  # the parameter itself if nothing has to change
        gradients.append(local(p.grad).to(dtype).contiguous())
        first.append(local(state["exp_avg"]))
        second.append(local(state["exp_avg_sq"]))
        steps.append(state["step"])
    beta1, beta2 = group["adamw_betas"]
    adamw(
        targets,
        gradients,
        first,
        second,
        [],
        steps,
        fused=True,
        found_inf=bad.float(),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )
    for p, target in zip(own, targets, strict=True):
        if target is not p:
            p.copy_(target)


def new_state(p: Tensor) -> Tensor:
    """Zeros for a parameter: contiguous, which fused AdamW relies on, and at least float32."""
    return torch.zeros_like(p, dtype=state_dtype(p.dtype), memory_format=torch.contiguous_format)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a parameter's state is kept in: at least float32."""
    return dtype if dtype in _WIDE else torch.float32
