"""A cap on the predicted change of the loss, in place of a warm-up (post kexue.fm/archives/10657).

A step W <- W - eta u changes the loss by about -eta u.g. Where the loss is steep, as at the start, that is more than
any loss has to give, and the step is too long for first-order reasoning. So the step is scaled:

    W <- W - eta min(1, T / (u.g)) u      only where u.g > T; momentum may make u.g negative, which is left alone

u.g is summed over all parameters and is of the real updates: Muon's, AdamW's, with momentum, decay and rounding. If
groups have rates of their own, u is per unit of the largest: u.g = sum (W_old - W_new).g / max eta. With one rate this
is the post's formula, and no step promises more than eta T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quintic.core.precision import accumulation_dtype
from quintic.optim.sharded import local, sum_over_parts

__all__ = ["cap_step_"]


def cap_step_(active: list[tuple[dict[str, Any], list[Tensor]]], before: list[Tensor], cap: float) -> Tensor:
    """Scale the step that was just taken, in place.

    Args:
        active: Groups with ``lr`` and ``maximize``, and their parameters that took part, with gradients.
        before: Copies of these parameters, in order, from before the step.
        cap: T, above 0.

    Returns:
        The factor, 0-d: 1 if the step was short enough, or was none. Nothing is read from the device.
    """
    moved = [
        (group, local(p.detach()), local(p.grad)) for group, params in active for p in params if p.grad is not None
    ]
    params_all = [p for _, params in active for p in params]
    before = [local(old) for old in before]
    device = before[0].device
    wide = accumulation_dtype(device)
    gains = []
    for (group, p, g), old in zip(moved, before, strict=True):
        dtype = torch.promote_types(p.dtype, torch.float32)
        promised = ((old.to(dtype) - p) * g).sum(dtype=wide).to(device)
        gains.append(-promised if group["maximize"] else promised)
    gain = sum_over_parts(gains, params_all)
    rates = [torch.as_tensor(group["lr"], dtype=wide, device=device).reshape(()) for group, params in active if params]
    most = cap * torch.stack(rates).max()
    # Gradients that are not finite make a gain that compares as false, and there was no step.
    factor = torch.where(gain > most, most / gain, 1.0)
    for (_, p, _), old in zip(moved, before, strict=True):
        dtype = torch.promote_types(p.dtype, torch.float32)
        p.copy_(torch.lerp(old.to(dtype), p.to(dtype), factor.to(p.device, dtype)))
    return factor
