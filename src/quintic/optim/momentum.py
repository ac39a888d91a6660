"""Momentum of matrices: an average of past gradients or their discounted sum, and the direction that is taken.

| form | momentum | direction (Nesterov) | used by |
|---|---|---|---|
| average | B <- mu B + (1 - mu) G | mu B + (1 - mu) G | torch.optim.Muon, Keller's |
| sum | B <- mu B + G | mu B + G | the posts, Moonlight |

Without Nesterov the direction is B. While mu is constant the sum is 1 / (1 - mu) times the average, and a matrix sign
does not see the factor. When mu rises, a new gradient weighs less at once in the average, and in the sum only as that
grows.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["MOMENTUM_FORMS", "advance_", "gradient_weight"]

MOMENTUM_FORMS = ("average", "sum")
"""Names of forms."""


def gradient_weight(form: str, momentum: float) -> float:
    """With what weight a gradient enters the momentum: 1 - mu of an average, 1 of a sum."""
    return 1.0 - momentum if form == "average" else 1.0


def advance_(
    group: dict[str, Any],
    momenta: list[Tensor],
    gradients: list[Tensor],
    keep: Tensor | float,
    directions: list[Tensor] | None = None,
) -> None:
    """Advance the momenta in place, and write the directions.

    Args:
        group: ``momentum``, ``momentum_form``, ``nesterov`` and ``maximize``.
        momenta: Of any shapes, one dtype and device.
        gradients: Of the same shapes and device; of the same dtype too if they are overwritten.
        keep: 1, or a 0-d tensor of 1 or 0, which leaves the momenta as they are; then the gradients are 0.
        directions: Like the momenta, where the directions go; None overwrites the gradients.
    """
    mu, average = group["momentum"], group["momentum_form"] == "average"
    by_average = average and not isinstance(keep, Tensor)
    usual = by_average and group["nesterov"] and not group["maximize"]
    if directions is None:
        directions = gradients
    elif not usual or any(gradient.dtype != directions[0].dtype for gradient in gradients):
        torch._foreach_copy_(directions, gradients)
        gradients = directions
    if group["maximize"]:
        torch._foreach_neg_(gradients)
    if by_average:
        torch._foreach_lerp_(momenta, gradients, 1.0 - mu)
    else:
        torch._foreach_mul_(momenta, 1.0 - keep * (1.0 - mu))
        torch._foreach_add_(momenta, gradients, alpha=gradient_weight(group["momentum_form"], mu))
    if not group["nesterov"]:
        torch._foreach_copy_(directions, momenta)
    elif directions is not gradients:  # a pass over memory less than with a copy
        for direction, gradient, momentum in zip(directions, gradients, momenta, strict=True):
            torch.lerp(gradient, momentum, mu, out=direction)
    elif average:
        torch._foreach_lerp_(directions, momenta, mu)
    else:
        torch._foreach_add_(directions, momenta, alpha=mu)
