"""Randomised singular value decomposition: the best approximation of a rank, and the yardstick of all others.

    A ~ U diag(S) V'        ||A - U diag(S) V'||_F^2 = sum of the other sigma_i^2, the least possible (post 10407)

A range finder with two power steps and ten extra vectors, then an exact decomposition of the small product; exact all
through where the matrix is small. For large matrices the error is within a few percent of the least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quintic.core import ConfigError
from quintic.linalg.sketch import dominant, seeded
from quintic.lowrank.result import Approximation, check_rank, search_rank
from quintic.lowrank.source import Dense, as_source

__all__ = ["SVD", "svd"]


@dataclass(frozen=True, eq=False, repr=False)
class SVD(Approximation):
    """A ~ U diag(S) Vh."""

    U: Any
    """(..., m, k), orthonormal columns."""
    S: Any
    """(..., k), descending."""
    Vh: Any
    """(..., k, n), orthonormal rows."""


def svd(A: Any, rank: int | None = None, *, tol: float | None = None, power: int = 2, seed: int = 0) -> SVD:
    """The leading singular triples of anything that can be decomposed.

    Exactly one of ``rank`` and ``tol`` is given. Differentiable where it is exact and the singular values differ.

    Args:
        A: (..., m, n), whatever :func:`quintic.lowrank.interpolative` takes.
        rank: k, 1 to min(m, n).
        tol: Largest relative error ||A - U diag(S) V'||_F / ||A||_F.
        power: Power steps; each costs two passes and brings the error nearer to the least.
        seed: Of the range finder.

    Raises:
        ConfigError: An argument is unusable, or the tolerance out of reach.
        DataError: A is no matrix, is empty, or has an element that is not finite.

    Example:
        >>> svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2).S
        tensor([3., 2.])
    """
    if (rank is None) == (tol is None):
        raise ConfigError("expected exactly one of rank and tol")
    if isinstance(power, bool) or not isinstance(power, int) or power < 0:
        raise ConfigError(f"power = {power!r}; expected a whole number, 0 or more")
    seeded(seed)  # or an error that says what a seed is, whether it is used or not
    source = as_source(A)

    def attempt(k: int) -> SVD:
        # Tensors have a batch and gradients; everything else is known by its products.
        U, S, Vh = dominant(source.tensor if isinstance(source, Dense) else source, k, seed=seed, power=power)
        if isinstance(source.scale, torch.Tensor):
            S = S * source.scale.reshape(S.shape[:-1] + (1,))
        U, S, Vh = (source.out(part) for part in (U, S, Vh))
        return SVD(U * S[..., None, :], Vh, "randomised", source, U, S, Vh)

    if tol is not None:
        return search_rank(attempt, source, tol)
    assert rank is not None
    return attempt(check_rank(rank, source))
