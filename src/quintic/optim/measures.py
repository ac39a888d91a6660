"""Quantities of gradients, weights and updates, each a plain function of tensors, computed in float64.

SVD entropy H = -(1 / log n) sum p log p with p = sigma^2 / sum sigma^2 (Moonlight, arXiv 2502.16982); signal to noise
|mu|^2 / |sigma|^2 of the gradient from ||m|| / ||g|| (post kexue.fm/archives/11267); cos(sign g, g) and the share of
each layer in ||g||^2 (post 10657).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.core.precision import in_float64

__all__ = [
    "change",
    "layer_shares",
    "sign_cosine",
    "signal_to_noise",
    "singular_values",
    "sums",
    "svd_entropy",
    "wide",
]

_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.")  # up to the first numbered module: blocks.3.attention.q.weight -> blocks.3
_CHUNK = 2**20  # elements converted to float64 at a time


@torch.no_grad()
def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of (..., n, m), largest first: (..., min(n, m)) in float64; NaN for what is not finite.

    Square roots of the eigenvalues of the smaller Gram matrix: many times faster than an SVD, and exact to
    about 1e-8 of the largest value.

    Example:
        >>> singular_values(torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    x = wide(matrices)
    if not x.numel():
        return x.new_zeros(*x.shape[:-2], min(x.shape[-2:]))
    peak = x.abs().amax((-2, -1), keepdim=True)
    finite = peak.isfinite()
    peak = torch.where(finite & (peak > 0), peak, 1.0)
    x = x / peak
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))  # which refuses NaN
    sigma = peak[..., 0] * eigenvalues.flip(-1).clamp_min(0.0).sqrt()
    return torch.where(finite[..., 0], sigma, math.nan)


def svd_entropy(sigma: Tensor) -> Tensor:
    """H = -(1 / log n) sum p log p with p = sigma^2 / sum sigma^2 over the last axis of n singular values.

    1 if all are equal, 0 for rank one and for no matrix at all (zero, or a single singular value).

    Example:
        >>> svd_entropy(torch.tensor([[2.0, 2.0], [2.0, 0.0], [0.0, 0.0]])).round(decimals=6)
        tensor([1., 0., 0.])
    """
    n = sigma.shape[-1]
    if n < 2:
        return sigma.new_zeros(sigma.shape[:-1])
    top = sigma.amax(-1, keepdim=True)
    p = (sigma / torch.where(top > 0, top, 1.0)).square()
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total > 0, total, 1.0)
    return torch.special.entr(p).sum(-1) / math.log(n)


def signal_to_noise(momentum_norm: float, gradient_norm: float, beta: float, steps: int | None = None) -> float:
    """|mu|^2 / |sigma|^2 of gradients with mean mu and spread sigma, from the norms of m and g (post 11267).

    For m <- beta m + (1 - beta) g, E|m|^2 = a |mu|^2 + b |sigma|^2 with a = (1 - beta^t)^2 and
    b = (1 - beta) / (1 + beta) (1 - beta^(2 t)), and E|g|^2 = |mu|^2 + |sigma|^2; the two are solved for the ratio.

    Args:
        momentum_norm: ||m||, average form, without bias correction.
        gradient_norm: ||g|| of the last gradient that went into m.
        beta: Decay rate of m, above 0.
        steps: t, how many gradients m has seen; ``None`` for many.

    Returns:
        The estimate, noisy for few elements; 0 if m is as small as from pure noise, infinite without noise, NaN if
        nothing can be told (zero gradient, or ``steps`` below 2).

    Raises:
        ConfigError: ``beta`` is not in (0, 1).

    Example:
        Adam's update RMS under pure noise is 0.2294 for beta = 0.9, "about 0.2":

        >>> round(signal_to_noise(0.5, 1.0, 0.9), 4), signal_to_noise(0.2294, 1.0, 0.9) < 1e-4
        (0.2632, True)
    """
    if not 0 < beta < 1:
        raise ConfigError(f"beta = {beta}; expected a number between 0 and 1: without momentum there is no estimate")
    t = math.inf if steps is None else steps
    if not gradient_norm > 0 or t < 2:
        return math.nan
    a = (1 - beta**t) ** 2
    b = (1 - beta) / (1 + beta) * (1 - beta ** (2 * t))
    ratio = (momentum_norm / gradient_norm) ** 2
    if ratio >= a:
        return math.inf
    return max(0.0, (ratio - b) / (a - ratio))


@torch.no_grad()
def sign_cosine(gradients: Iterable[Tensor]) -> float:
    """cos(sign g, g) = ||g||_1 / (sqrt(N) ||g||) over all tensors together; N counts the elements that are not 0.

    About 0.8 = sqrt(2 / pi) for Gaussian gradients, less if few elements dominate; NaN if all are 0.

    Example:
        >>> sign_cosine([torch.tensor([5.0, -5.0]), torch.zeros(7)]), sign_cosine([torch.tensor([3.0, 4.0])])
        (1.0, 0.98994...)
    """
    one, two, count = (sum(column) for column in zip(*map(sums, gradients), (0.0, 0.0, 0), strict=True))
    return one / math.sqrt(count * two) if two > 0 else math.nan


@torch.no_grad()
def layer_shares(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Each layer's share of the squared gradient norm; shares add up to 1.

    A layer is what a name says up to its first number, or else the name of the module.

    Example:
        >>> g = {"embed.weight": torch.tensor([1.0]), "blocks.0.a.weight": torch.tensor([1.0, 1.0]),
        ...      "blocks.0.b.weight": torch.tensor([1.0])}
        >>> layer_shares(g)
        {'embed': 0.25, 'blocks.0': 0.75}
    """
    squares: dict[str, float] = {}
    for name, g in gradients.items():
        match = _LAYER.match(name)
        layer = match[1] if match else name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + sums(g)[1]
    total = sum(squares.values())
    return {layer: square / total if total else 0.0 for layer, square in squares.items()}


def wide(t: Tensor) -> Tensor:
    """In float64, on the CPU for devices that have none."""
    return in_float64(t.detach())


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Corresponding elements of tensors of one shape, a bounded number at a time, in float64."""
    flat = [t.detach().reshape(-1).split(_CHUNK) for t in tensors]
    return (tuple(map(wide, parts)) for parts in zip(*flat, strict=True))


def sums(t: Tensor) -> tuple[float, float, int]:
    """Sum of magnitudes, sum of squares, number of elements that are not 0."""
    one, two, count = 0.0, 0.0, 0
    for (x,) in _chunks(t):
        one += x.abs().sum().item()
        two += x.square().sum().item()
        count += int(x.count_nonzero())
    return one, two, count


def change(after: Tensor, before: Tensor, g: Tensor) -> float:
    """(after - before).g, the change of the loss to first order."""
    return sum(((a - b) * c).sum().item() for a, b, c in _chunks(after, before, g))
