"""Model FLOPs utilisation (MFU): what a step reaches of the measured peak of the matrix product."""

from __future__ import annotations

import torch

from quintic.core.machine import matmul_peak

__all__ = ["Peak"]


class Peak:
    """The peak of one device, measured again where a step beats it: it may have been taken in a slow moment.

    Args:
        device: Where the model is.
        dtype: Of its matrix products.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.flops_per_second = matmul_peak(device, dtype)
        """The best rate seen."""

    def reached_by(self, flops: float, seconds: float) -> float:
        """MFU of ``flops`` done by this device in ``seconds``, at most 1."""
        rate = flops / seconds
        if rate > self.flops_per_second:
            self.flops_per_second = max(rate, matmul_peak(self._device, self._dtype, remeasure=True))
        return rate / self.flops_per_second
