"""Gradient clipping by the global norm: g <- g * min(1, c / ||g||), ||g|| over all parameters together.

Post kexue.fm/archives/10657 argues why c = 1 is a good default.

The norm is computed without overflow or underflow: per tensor ||g|| = peak * ||g / peak|| with peak its largest
magnitude, in at least float32, and the tensors are combined in float64. So float32 gradients of 1e20, whose
squares overflow, are clipped and not zeroed. No synchronisation with the device takes place.
"""

# The torch._foreach functions have no public name.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quintic.core import ConfigError

__all__ = ["ClipResult", "clip_grad_norm_", "global_norm"]


class ClipResult(NamedTuple):
    """What clipping found and did; 0-d tensors on the gradients' device, so that reading them is up to the caller."""

    norm: Tensor
    """Global norm before clipping, float64 where the device has it; NaN or infinite if a gradient is."""
    scale: Tensor
    """Factor applied to every gradient: 1 when nothing was clipped."""
    clipped: Tensor
    """bool: the norm was finite and above the threshold."""
    finite: Tensor
    """bool: every gradient was finite. If not, the gradients were left untouched: skip the step."""


@torch.no_grad()
def clip_grad_norm_(parameters: nn.Module | Tensor | Iterable[Tensor], max_norm: float = 1.0) -> ClipResult:
    """Scale the gradients of all parameters in place so that their global norm is at most ``max_norm``.

    Args:
        parameters: A module, a tensor or tensors; those without a gradient are passed over, and one that is
            listed twice counts and is scaled once.
        max_norm: The threshold, above 0. ``float("inf")`` only measures.

    Returns:
        The norm and what was done. With a non-finite norm nothing is changed.

    Raises:
        ConfigError: ``max_norm`` is not positive, or a gradient is sparse.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> result = clip_grad_norm_(w)
        >>> float(result.norm), bool(result.clipped), w.grad
        (5.0, True, tensor([0.6000, 0.8000]))
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm = {max_norm}; expected a positive number (inf only measures)")
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    grads = list({id(p.grad): p.grad for p in parameters if p.grad is not None}.values())
    if any(g.layout != torch.strided for g in grads):
        raise ConfigError("a gradient is sparse; use Embedding(sparse=False), or leave its parameter out of clipping")
    norm = global_norm(grads)
    finite = norm.isfinite()
    clipped = finite & (norm > max_norm)
    scale = torch.where(clipped, max_norm / norm, 1.0)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in grads:
        by_kind.setdefault((g.device, g.dtype), []).append(g)
    for (device, dtype), group in by_kind.items():
        # Half precision is multiplied by a float32 number, whose range does not lose a small scale.
        torch._foreach_mul_(group, scale.to(device, dtype if dtype == torch.float64 else torch.float32))
    return ClipResult(norm, scale, clipped, finite)


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all elements of all tensors, 0-d; 0 for none. Exact for any magnitude of the dtype."""
    norms = [_norm(t) for t in tensors if t.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return _norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _norm(t: Tensor) -> Tensor:
    low, high = torch.aminmax(t)  # much faster on CPUs than the infinity norm, and NaN goes through it too
    wide = torch.float32 if t.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    peak = torch.maximum(-low, high).to(wide)
    peak = torch.where(peak > 0, peak, 1.0)
    x = t if t.dtype == torch.float64 else t.float()
    return peak * torch.linalg.vector_norm(x / peak.to(x.dtype)).to(wide)
