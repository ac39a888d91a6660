"""The selection rules by name, and how they are applied to what is not a matrix in memory.

A rule that needs products only (residual_aware, sketched_lu, deim), or nothing (uniform), works on every source. All
others work on the matrix itself where it is in memory, and on a sketch Omega A / sqrt(l) of l = 2 k + 10 rows where it
is not: its columns have nearly the lengths and angles of those of A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quintic.core import ConfigError, suggest
from quintic.linalg.sketch import OVERSAMPLING, seeded, sketch_rows
from quintic.lowrank import pivots, scores
from quintic.lowrank.source import Dense, Source, as_source

__all__ = ["RULES", "Method", "choose", "method_name", "select_columns", "select_rows"]

Method = str | Callable[..., Tensor]
"""A name out of :data:`RULES`, or a function ``rule(A, k, *, seed)`` of the same contract; A comes at its scale."""

RULES: dict[str, Callable[..., Tensor]] = {
    "quality": pivots.residual_aware,
    "fast": pivots.sketched_lu,
    "pivoted-qr": pivots.pivoted_qr,
    "deim": pivots.deim,
    "greedy-error": pivots.greedy_error,
    "greedy-det": pivots.greedy_det,
    "norms-top": scores.norms_top,
    "norms-sampled": scores.norms_sampled,
    "leverage-top": scores.leverage_top,
    "leverage-sampled": scores.leverage_sampled,
    "leverage-ridge": scores.leverage_ridge,
    "k-means": scores.k_means,
    "uniform": scores.uniform,
    "subsampled": scores.subsampled,
}
"""Selection rules by name; ``quality`` is the residual-aware rule of Osinsky, ``fast`` a sketch and LU pivots."""

_BY_PRODUCTS = {pivots.residual_aware, pivots.sketched_lu, pivots.deim, scores.uniform}


def select_columns(A: Any, k: int, *, method: Method = "quality", seed: int = 0) -> Tensor:
    """Positions of k columns of anything that can be decomposed: (..., k), in the order of the rule.

    Args:
        A: (..., m, n); see :mod:`quintic.lowrank.source`.
        k: 1 to min(m, n).
        method: A name out of :data:`RULES`, or a rule; ``functools.partial(leverage_top, gamma=3)`` is one.
        seed: Of whatever the rule draws.

    Raises:
        ConfigError: k or the method is unusable.
        DataError: A is.

    Example:
        >>> A = torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
        >>> sorted(select_columns(A, 2, method="pivoted-qr").tolist())
        [0, 2]
    """
    return choose(as_source(A), k, method, seed)


def select_rows(A: Any, k: int, *, method: Method = "quality", seed: int = 0) -> Tensor:
    """Positions of k rows, as :func:`select_columns` of the conjugate transpose.

    Example:
        >>> select_rows(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0]]), 2, method="norms-top")
        tensor([1, 2])
    """
    return choose(as_source(A).H, k, method, seed)


def choose(source: Source, k: int, method: Method, seed: int) -> Tensor:
    """Columns of a source."""
    rule = _rule(method)
    seeded(seed)  # or an error that says what a seed is, whether it is used or not
    if isinstance(source, Dense):
        # What has a size, as the ridge of ``partial(leverage_ridge, ridge=...)``, is meant of the matrix as given.
        shown = (source.given if callable(method) else source.tensor).detach()
    elif rule in _BY_PRODUCTS:
        shown = source
    else:
        size = min(2 * k + OVERSAMPLING, *source.shape)
        with torch.no_grad():
            shown = sketch_rows(source, size, seed=seed)
            if callable(method):
                shown = shown * (source.scale * size**-0.5)
    chosen = rule(shown, k, seed=seed)
    return _checked(chosen, k, source, method) if callable(method) else chosen


def _checked(chosen: Any, k: int, source: Source, method: Method) -> Tensor:
    """What a user's rule chose."""
    shape, n = (*source.shape[:-2], k), source.shape[-1]
    try:
        at = torch.as_tensor(chosen, device=source.device)
    except (TypeError, ValueError, RuntimeError):
        at = torch.empty(0)
    right = at.shape == shape and not (at.is_floating_point() or at.is_complex() or at.dtype == torch.bool)
    if right:
        ordered = at.sort(-1).values
        right = int(ordered.min()) >= 0 and int(ordered.max()) < n and bool((ordered.diff(dim=-1) > 0).all())
    if not right:
        raise ConfigError(
            f"the rule {method_name(method)} chose {chosen!r}; expected {k} different positions from 0 to {n - 1}, "
            f"whole numbers of shape {shape}"
        )
    return at.long()


def method_name(method: Method) -> str:
    """For a person."""
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _rule(method: Method) -> Callable[..., Tensor]:
    if callable(method):
        return method
    if method not in RULES:
        raise ConfigError(f"unknown method {method!r}{suggest(str(method), RULES)}")
    return RULES[method]
