"""The one result object that a task hands to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Loss"]


@dataclass
class Loss:
    """The loss of one micro-batch."""

    total: Tensor
    """Sum over the counted elements, with a graph; the loop divides by the global count."""
    count: int
    """Counted elements: tokens that are predicted, or pixels."""
    regularizer: Tensor | None = None
    """Added to ``total`` for the gradient and not reported; a sum over the counted elements too."""
    stats: dict[str, float] = field(default_factory=dict)
    """More numbers to log, already averaged."""
