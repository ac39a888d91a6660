"""What a step does with gradients that are NaN or infinite. Momentum is never touched by one, whatever the policy.

* ``skip``: the whole step is left out and counted. Nothing is read from the device.
* ``skip-parameter``: the parameters concerned are left out, the others take their step.
* ``raise``: an error that names the parameters, before anything has changed.
* ``propagate``: the parameters concerned become NaN, so that whoever looks at the loss sees it.

All but the first read one number per parameter, which waits for an accelerator.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quintic.optim.clip import NonFiniteGradientError
from quintic.optim.groups import name_of
from quintic.optim.sharded import agree_on_any, local

__all__ = ["NONFINITE", "any_nonfinite", "sift_nonfinite_"]

NONFINITE = ("skip", "skip-parameter", "raise", "propagate")

Active = list[tuple[dict[str, Any], list[Tensor]]]


def any_nonfinite(gradients: list[Tensor]) -> Tensor:
    """0-d bool: some element of some gradient is NaN or infinite. One pass, no synchronisation of accelerators."""
    return agree_on_any(_any_here(gradients), gradients)


def _any_here(gradients: list[Tensor]) -> Tensor:
    """The same of what lies with this process."""
    device = gradients[0].device
    here = [g for g in map(local, gradients) if g.numel()]
    if not here or _all_finite_by_norm(here):
        return torch.zeros((), dtype=torch.bool, device=device)
    ends = [end.to(device) for g in here for end in torch.aminmax(g)]
    return ~torch.stack(ends).isfinite().all()


def _all_finite_by_norm(tensors: list[Tensor]) -> bool:
    """On CPUs a quick look: finite norms are of finite elements. If not, an element or only a square was too large."""
    if torch.compiler.is_compiling() or any(t.device.type != "cpu" for t in tensors):
        return False
    return bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all())


def sift_nonfinite_(active: Active, policy: str) -> Active:
    """The parameters that take a step under a policy other than ``skip``.

    Args:
        active: Groups and their parameters, all with gradients.
        policy: ``skip-parameter``, ``raise`` or ``propagate``, which overwrites parameters with NaN.

    Raises:
        NonFiniteGradientError: With ``raise``, if a gradient is not finite; nothing has changed.
    """
    every = [(group, p) for group, params in active for p in params]
    if not every:
        return active
    gradients = [p.grad for _, p in every if p.grad is not None]
    flags = agree_on_any(torch.stack([_any_here([g]).to(gradients[0].device) for g in gradients]), gradients)
    bad = {id(p) for (_, p), flag in zip(every, flags.tolist(), strict=True) if flag}
    if bad and policy == "raise":
        names = [name_of(group, p) for group, p in every if id(p) in bad]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise NonFiniteGradientError(
            f"the gradient of {', '.join(names[:5])}{more} is not finite; nothing was updated. Lower the learning rate "
            "or lengthen the warm-up; nonfinite='skip' leaves such steps out"
        )
    if policy == "propagate":
        for _, p in every:
            if id(p) in bad:
                local(p.detach()).fill_(float("nan"))
    return [(group, [p for p in params if id(p) not in bad]) for group, params in active]
