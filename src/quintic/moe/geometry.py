"""How well k of n vectors stand for their sum.

Post: https://kexue.fm/archives/10699. A dense feed-forward network cut in n pieces is a sum of expert vectors,
y = sum of v_i. Keeping the set K costs ||sum of v_i outside of K||^2, a quadratic form of the Gram matrix:

    error(K) = c' G c,   G_ij = <v_i, v_j>,   c_i = 1 where i is dropped

If the v_i are orthogonal it is the sum of the dropped ||v_i||^2, so the k largest norms are the best choice. In general
that is an approximation, and the functions here measure how good it is. All return errors for k = 0 ... n.

Legend: t tokens, n vectors, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quintic.core.precision import in_float64

__all__ = ["EXHAUSTIVE", "best_errors", "gram_matrices", "orthogonal_errors", "random_errors", "ranked_errors"]

EXHAUSTIVE = 16
"""Up to this many vectors all 2^n subsets are tried."""

_CHUNK = 32  # tokens whose subsets are tried together: 2^16 float64 errors each


def gram_matrices(v_tnd: Tensor) -> Tensor:
    """(tokens, n, n) float64 inner products of the vectors of each token; on the CPU if their device has no float64."""
    v_tnd = in_float64(v_tnd)
    return v_tnd @ v_tnd.transpose(1, 2)


def ranked_errors(gram_tnn: Tensor, rank_tn: Tensor) -> Tensor:
    """Errors of keeping the k largest by a given value, e.g. the true or the predicted norms.

    Args:
        gram_tnn: (tokens, n, n).
        rank_tn: (tokens, n); equal values are kept in the order of their index.

    Returns:
        (tokens, n + 1), from k = 0 (everything dropped) to k = n (0).

    Example:
        >>> v = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]])
        >>> ranked_errors(gram_matrices(v), v.norm(dim=-1)).tolist()
        [[20.0, 5.0, 1.0, 0.0]]
    """
    order_tn = torch.sort(rank_tn, dim=1, descending=True, stable=True)[1]
    index_tnn = order_tn.unsqueeze(2).expand_as(gram_tnn)
    sorted_tnn = gram_tnn.gather(1, index_tnn).gather(2, index_tnn.transpose(1, 2))
    # The dropped ones are a corner of the sorted matrix: sums from the far end, along both axes.
    corner_tnn = sorted_tnn.flip(1, 2).cumsum(1).cumsum(2)
    sums_tn = corner_tnn.diagonal(dim1=1, dim2=2).flip(1)
    return torch.cat([sums_tn, sums_tn.new_zeros(len(sums_tn), 1)], dim=1)


def orthogonal_errors(gram_tnn: Tensor) -> Tensor:
    """What keeping the largest norms would cost if the vectors were orthogonal: (tokens, n + 1)."""
    diagonal_tn = gram_tnn.diagonal(dim1=1, dim2=2)
    return ranked_errors(torch.diag_embed(diagonal_tn), diagonal_tn)


def random_errors(gram_tnn: Tensor) -> Tensor:
    """Expected errors of k vectors drawn at random, in closed form: (tokens, n + 1).

    With r dropped, i is dropped with probability r / n, and i and j together with r (r - 1) / (n (n - 1)).
    """
    n = gram_tnn.shape[1]
    trace_t1 = gram_tnn.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    rest_t1 = gram_tnn.sum((1, 2)).unsqueeze(1) - trace_t1
    dropped = torch.arange(n, -1, -1, dtype=gram_tnn.dtype, device=gram_tnn.device)
    return trace_t1 * (dropped / n) + rest_t1 * (dropped * (dropped - 1) / max(1, n * (n - 1)))


def best_errors(gram_tnn: Tensor) -> Tensor:
    """The smallest errors that any subset reaches: (tokens, n + 1).

    Exact up to :data:`EXHAUSTIVE` vectors, by trying all subsets. Beyond, an upper bound: the cheapest vectors are
    dropped one by one, and after each drop the best exchange of a dropped and a kept one is made as long as one helps.
    """
    search = _all_subsets if gram_tnn.shape[1] <= EXHAUSTIVE else _greedy_with_exchanges
    return torch.cat([search(chunk) for chunk in gram_tnn.split(_CHUNK)])


def _all_subsets(gram_tnn: Tensor) -> Tensor:
    tokens, n, _ = gram_tnn.shape
    # Subset s in bits; with vector i it costs error(s) + G_ii + 2 sum over j in s of G_ij. Doubling fills both tables.
    error_ts = gram_tnn.new_zeros(tokens, 1)
    size_s = torch.zeros(1, dtype=torch.int64, device=gram_tnn.device)
    for i in range(n):
        inner_ts = gram_tnn.new_zeros(tokens, 1)
        for j in range(i):
            inner_ts = torch.cat([inner_ts, inner_ts + gram_tnn[:, i, j, None]], dim=1)
        error_ts = torch.cat([error_ts, error_ts + gram_tnn[:, i, i, None] + 2.0 * inner_ts], dim=1)
        size_s = torch.cat([size_s, size_s + 1])
    best = [error_ts[:, size_s == n - k].amin(1) for k in range(n + 1)]
    return torch.stack(best, dim=1).clamp(min=0.0)


def _greedy_with_exchanges(gram_tnn: Tensor) -> Tensor:
    tokens, n, _ = gram_tnn.shape
    at = torch.arange(tokens, device=gram_tnn.device)
    diagonal_tn = gram_tnn.diagonal(dim1=1, dim2=2)
    dropped_tn = torch.zeros_like(diagonal_tn, dtype=torch.bool)
    cross_tn = torch.zeros_like(diagonal_tn)  # inner product of each vector with the sum of the dropped
    error_t = gram_tnn.new_zeros(tokens)
    found = [error_t]
    for _ in range(n):
        cost_tn = (diagonal_tn + 2.0 * cross_tn).masked_fill(dropped_tn, torch.inf)
        cost_t, index_t = cost_tn.min(1)
        error_t, cross_tn = error_t + cost_t, cross_tn + gram_tnn[at, index_t]
        dropped_tn[at, index_t] = True
        for _ in range(n):
            back_tn = (diagonal_tn - 2.0 * cross_tn).masked_fill(~dropped_tn, torch.inf)
            drop_tn = (diagonal_tn + 2.0 * cross_tn).masked_fill(dropped_tn, torch.inf)
            gain_t, pair_t = (back_tn[:, :, None] + drop_tn[:, None, :] - 2.0 * gram_tnn).flatten(1).min(1)
            helps_t = gain_t < -1e-12 * diagonal_tn.sum(1)
            if not helps_t.any():
                break
            back_t, drop_t = pair_t // n, pair_t % n
            here = at[helps_t]
            dropped_tn[here, back_t[helps_t]] = False
            dropped_tn[here, drop_t[helps_t]] = True
            change_tn = gram_tnn[at, drop_t] - gram_tnn[at, back_t]
            error_t = torch.where(helps_t, error_t + gain_t, error_t)
            cross_tn = torch.where(helps_t[:, None], cross_tn + change_tn, cross_tn)
        found.append(error_t)
    return torch.stack(found[::-1], dim=1).clamp(min=0.0)
