"""The precision in which a flow is sampled and measured: float32 or float64, whatever surrounds it.

Rounding in bfloat16 moves a pixel of the shipped flow, whose range is -1 to 1, by up to 0.11 (float16: 0.006; float32:
5e-6), and its log-density by a thousandth of a nat per number; and a guess that is checked never passes, so that every
block would be inverted twice. Training under autocast, with weights in float32, has none of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.core import ConfigError

__all__ = ["full_precision"]


def full_precision(weight: Tensor) -> torch.autocast:
    """A context without autocast, for what is looked at or reported.

    Args:
        weight: One of the flow's.

    Raises:
        ConfigError: The weights are in half precision.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"the weights of this flow are in {weight.dtype}; expected float32 or float64 to sample or to measure: "
            "convert it by flow.float(), and train with weights in float32, under autocast"
        )
    return torch.autocast(weight.device.type, enabled=False)
