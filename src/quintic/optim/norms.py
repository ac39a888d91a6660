"""Norms of gradients, without overflow or underflow whatever their magnitude.

Squares of float32 numbers of 1e20 overflow, and those of 1e-25 vanish. Three ways around it, the first that will do:

* on CPUs the plain norms of all tensors at once, if their total shows that no square can have been lost;
* on accelerators the same with float64 sums, in which squares of float32 numbers have room; no value is read;
* tensor by tensor ||g|| = peak ||g / peak|| with peak its largest magnitude, in at least float32.

Tensors are combined in float64. Apple's GPUs have none: float32 there, and the last way.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quintic.core.precision import accumulation_dtype
from quintic.optim.sharded import local, settled, sum_over_parts

__all__ = ["global_norm", "scaled_norm", "spectral_norms"]

_SAFE = {torch.float64: (1e-140, 1e140)}
_SAFE_NARROW = (1e-10, float("inf"))
"""Totals between which no loss of squares matters: below 1e-38 they vanish, and there are fewer than 1e12 of them."""
_PIECE = 2**15
"""Elements."""


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors, 0-d; 0 for none. Exact for any magnitude of the dtype.

    Of divided tensors (DTensor) the norm of the whole, on every process, whatever meshes they lie on.

    Raises:
        ConfigError: They lie on meshes of different sets of processes.
    """
    listed = [settled(t) for t in tensors if t.numel()]
    if not listed:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    cut = [(piece, t) for t in listed for piece in _pieces(local(t))]
    found = _each([piece for piece, _ in cut], listed[0].device)
    if not any(isinstance(t, DTensor) for t in listed):
        return scaled_norm(torch.cat([norms for _, norms in found]))
    squares = [square for _, norms in found for square in norms.square().unbind()]
    return sum_over_parts(squares, [cut[i][1] for indices, _ in found for i in indices]).sqrt()


def _pieces(t: Tensor) -> Sequence[Tensor]:
    """A tensor on a CPU in parts of which a sum is accurate: float32 sums of 1e8 squares there are a percent off."""
    if t.device.type != "cpu" or t.numel() <= _PIECE or not t.is_contiguous():
        return (t,)
    return t.view(-1).split(_PIECE)


def _each(tensors: list[Tensor], device: torch.device) -> list[tuple[list[int], Tensor]]:
    """The norms of all tensors, on one device: by kind which they are and (number of them,)."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, t in enumerate(tensors):
        kinds.setdefault((t.device, t.dtype, t.numel() == 0), []).append(i)
    found = []
    for (there, dtype, empty), indices in kinds.items():
        alike = [tensors[i] for i in indices]
        if empty:  # of a divided tensor perhaps nothing lies here
            norms = torch.zeros(len(alike), device=device)
        elif (norms := _together(alike, there, dtype)) is None:
            norms = torch.stack([scaled_norm(t) for t in alike])
        found.append((indices, norms.to(device, accumulation_dtype(device))))
    return found


def _together(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Norms of tensors of one kind in one pass, (number of tensors,); None if squares may be lost."""
    if accumulation_dtype(device) != torch.float64 or (dtype == torch.float64 and device.type != "cpu"):
        return None
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)) if dtype != torch.float64 else None
    wide = torch.promote_types(dtype, torch.float32)  # a half-precision norm would be rounded
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).to(torch.float64)
    low, high = _SAFE.get(dtype, _SAFE_NARROW)
    return norms if low < float(torch.linalg.vector_norm(norms)) < high else None


def scaled_norm(t: Tensor) -> Tensor:
    """Euclidean norm of one tensor by its largest magnitude, 0-d, float64 where the device has it."""
    low, high = torch.aminmax(t)  # much faster on CPUs than the infinity norm, and NaN goes through it too
    peak = torch.maximum(-low, high).to(accumulation_dtype(t.device))
    peak = torch.where(peak > 0, peak, 1.0)
    x = t if t.dtype == torch.float64 else t.float()
    return peak * torch.linalg.vector_norm(x / peak.to(x.dtype)).to(peak.dtype)


def spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular value of each of (k, n, m), without over- or underflow; 0 for one that is not finite."""
    low, high = matrices.flatten(1).aminmax(dim=1)
    peak = torch.maximum(-low, high).to(accumulation_dtype(matrices.device))
    usable = peak.isfinite()
    peak = torch.where(usable & (peak > 0), peak, 1.0)
    x = matrices if matrices.dtype == torch.float64 else matrices.float()
    x = x / peak.to(x.dtype)[:, None, None]
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    gram = torch.where(usable[:, None, None], gram, 0.0)  # eigvalsh refuses NaN
    return peak * torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0.0).sqrt().to(peak.dtype)
