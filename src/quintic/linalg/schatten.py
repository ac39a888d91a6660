"""Steepest descent under Schatten norms: trust regions between msign and the normalised gradient.

The direction U of ||U||_p <= 1 that maximises <G, U> attains the dual norm ||G||_q, with ||G||_q^q = sum sigma^q and
1/p + 1/q = 1:

    U = sum_i u_i v_i' sigma_i^(q - 1) / ||G||_q^(q - 1)        for G = sum_i sigma_i u_i v_i'

p = infinity is msign (||G||_1 is the nuclear norm), p = 2 is G / ||G||_F, and p = 1 the top pair u_1 v_1' alone (of
the first, where sigma_1 = sigma_2). Post kexue.fm/archives/10739 suggests the family.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quintic.core import ConfigError
from quintic.linalg.spectral import check_matrices, wide_and_scaled

__all__ = ["schatten_direction", "schatten_exponent"]


def schatten_exponent(norm: str) -> float:
    """p of a name ``schatten:p``, a number of 1 or more, or ``inf``.

    Raises:
        ConfigError: It is not such a name.

    Example:
        >>> schatten_exponent("schatten:inf"), schatten_exponent("schatten:4")
        (inf, 4.0)
    """
    kind, _, number = norm.partition(":") if isinstance(norm, str) else ("", "", "")
    try:
        p = float(number)
    except ValueError:
        p = math.nan
    if kind != "schatten" or not p >= 1:
        raise ConfigError(f"unknown norm {norm!r}; expected schatten:p with p from 1 to inf, such as 'schatten:inf'")
    return p


def schatten_direction(G: Tensor, p: float) -> Tensor:
    """The matrix of Schatten p-norm 1 that has the largest product with G, by a singular value decomposition.

    Scale-invariant over the whole range of the dtype; zero for a zero matrix, NaN for one that is not finite.

    Args:
        G: (..., n, m), real, floating.
        p: 1 or more; may be infinite.

    Returns:
        (..., n, m) in G's dtype; half precision is computed in float32.

    Raises:
        ConfigError: ``p`` is below 1, or G is not a floating (..., n, m) tensor.

    Example:
        >>> G = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> schatten_direction(G, 2), schatten_direction(G, torch.inf), schatten_direction(G, 1)
        (tensor([[0.6000, 0.0000],
                 [0.0000, 0.8000]]), tensor([[1., 0.],
                                             [0., 1.]]), tensor([[0., 0.],
                                                                 [0., 1.]]))
    """
    if not p >= 1:
        raise ConfigError(f"p = {p}; expected a number from 1 to inf")
    check_matrices(G)
    X, _ = wide_and_scaled(G)
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    X = X.masked_fill(~finite, 0.0)  # LAPACK refuses a whole batch for one non-finite element
    if p == 2:
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
        out = X / torch.where(norm > 0, norm, 1.0)
    else:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        out = (U * _profile(S, p, max(X.shape[-2:])).unsqueeze(-2)) @ Vh
    return out.masked_fill(~finite, torch.nan).to(G.dtype)


def _profile(S: Tensor, p: float, longest: int) -> Tensor:
    """The direction's singular values for G's, which are in descending order."""
    top = S[..., :1]
    if p == 1:
        first = torch.zeros_like(S)
        first[..., :1] = (top > 0).to(S.dtype)
        return first
    floor = top * (longest * torch.finfo(S.dtype).eps)
    kept = S.gt(floor)  # below is rounding, which infinite p would raise to 1
    q = p / (p - 1) if p < math.inf else 1.0
    ratio = torch.where(kept, S / torch.where(top > 0, top, 1.0), 1.0)
    powers = torch.where(kept, ratio ** (q - 1), 0.0)
    total = torch.where(kept, ratio**q, 0.0).sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0) ** (1 - 1 / q)
