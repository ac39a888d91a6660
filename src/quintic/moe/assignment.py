"""Assignment by a bias: the update that balances experts, applied to any matrix of costs.

Post: https://kexue.fm/archives/10757 (its last section). Send n items to m bins at least total cost, bin j taking
its capacity. Give every bin a bias and let every item choose for itself,

    choice_i = argmin_j (c_ij + b_j),      b_j += u_t (F_j - Q_j) / max |F - Q|

with F the number of items that chose j and Q its capacity. An over-full bin must become *dearer*: the sign is the
opposite of the one printed in the post, and of the one for experts, where the largest score is chosen. The step u_t
has to decay: with a constant one, ties at the end are traded to and fro forever.

b are the prices of the dual problem: for any b, sum_i min_j (c_ij + b_j) - sum_j Q_j b_j is a lower bound of the
cost, and a choice made at prices b is the cheapest one *with its own loads*. So the few items that are still in an
over-full bin when the steps have decayed are moved along the cheapest chains of exchanges that end in a bin with
room: that keeps the choice the cheapest for its loads, and the result is optimal, not only close.

A selection with an argmin cures the collapse of a codebook in the same way: see the example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quintic.core import DataError

__all__ = ["Assignment", "balanced_assign"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Assignment:
    """Where every item goes."""

    bins: NDArray[np.int64]
    """(items,) the bin of each item; loads are the capacities."""
    cost: float
    """Sum of the costs."""
    bias: Floats
    """(bins,) prices of the bias update, before any exchange."""
    bound: float
    """The dual value at these prices: no assignment costs less."""
    moved: int
    """Items that the prices alone left in an over-full bin."""


def balanced_assign(costs: ArrayLike, capacity: ArrayLike | None = None, *, steps: int = 1000) -> Assignment:
    """Assign items to bins of given capacity at least cost, by the bias update of loss-free balance.

    Args:
        costs: (items, bins) finite numbers.
        capacity: (bins,) items that each bin takes, with sum ``items``; None spreads them as evenly as integers
            allow, the first bins taking one more.
        steps: Bias updates. More of them leave fewer exchanges, O(items * bins + bins^3) each.

    Raises:
        DataError: Costs are not a finite matrix, or capacities do not add up to the items.

    Example:
        >>> found = balanced_assign([[4.0, 1.0], [3.0, 2.0], [9.0, 5.0], [1.0, 8.0]])
        >>> found.bins.tolist(), found.cost
        ([1, 0, 1, 0], 10.0)

        A codebook that collapses: eight clusters, eight codes, and the nearest-code rule ends with two codes at
        work. A bias in the choice alone, by the update for experts with k = 1, brings every code to its cluster:

        >>> import torch
        >>> from quintic.moe import LossFree
        >>> g = torch.Generator().manual_seed(0)
        >>> angle = torch.arange(8) * torch.pi / 4
        >>> centres = torch.stack([angle.cos(), angle.sin()], 1)
        >>> data = centres.repeat(100, 1) + 0.05 * torch.randn(800, 2, generator=g)
        >>> start = torch.randn(8, 2, generator=g) * 0.1 + torch.arange(8).unsqueeze(1)
        >>> def fit(balance):
        ...     codes, bias = start.clone(), torch.zeros(8)
        ...     for _ in range(400):
        ...         choice = (bias - torch.cdist(data, codes).square()).argmax(1)
        ...         counts = torch.bincount(choice, minlength=8)
        ...         for j in counts.nonzero().flatten():
        ...             codes[j] += 0.2 * (data[choice == j].mean(0) - codes[j])
        ...         if balance is not None:
        ...             balance.step(bias, counts, top_k=1)
        ...     nearest = torch.cdist(data, codes).min(1)
        ...     return len(nearest.indices.unique()), nearest.values.square().mean().item()
        >>> fit(None)[0]
        2
        >>> used, error = fit(LossFree("relative", rate=0.3))
        >>> used, error < 0.006  # the clusters' own variance is 0.005
        (8, True)
    """
    c = np.asarray(costs, dtype=np.float64)
    if c.ndim != 2 or not c.size or not np.isfinite(c).all():
        raise DataError(f"costs must be a finite (items, bins) matrix, found shape {c.shape}")
    items, bins = c.shape
    room = _capacity(capacity, items, bins)
    bias, choice = _prices(c, room, steps)
    bound = float((c + bias).min(axis=1).sum() - room @ bias)
    excess = np.bincount(choice, minlength=bins) - room
    moved = int(excess.clip(min=0).sum())
    for _ in range(moved):
        _exchange(c, choice, excess)
    assert not excess.any()
    return Assignment(choice, float(c[np.arange(items), choice].sum()), bias, bound, moved)


def _capacity(capacity: ArrayLike | None, items: int, bins: int) -> NDArray[np.int64]:
    if capacity is None:
        return np.full(bins, items // bins) + (np.arange(bins) < items % bins)
    room = np.asarray(capacity)
    if room.shape != (bins,) or (room < 0).any() or (room != room.astype(np.int64)).any() or room.sum() != items:
        raise DataError(
            f"capacity must be {bins} integers >= 0 that add up to the {items} items, "
            f"found shape {room.shape} with sum {room.sum()}"
        )
    return room.astype(np.int64)


def _prices(c: Floats, room: NDArray[np.int64], steps: int) -> tuple[Floats, NDArray[np.int64]]:
    """Prices with the least excess seen, and the choice at them."""
    bins = c.shape[1]
    bias = np.zeros(bins)
    best = (np.inf, bias, np.zeros(len(c), dtype=np.int64))
    # From the spread of the costs down to a rounding error of it, evenly on a logarithmic scale.
    for step in np.ptp(c) * np.geomspace(0.5, 1e-6, max(1, steps)):
        choice = (c + bias).argmin(axis=1)
        excess = np.bincount(choice, minlength=bins) - room
        total = np.abs(excess).sum()
        if total < best[0]:
            best = (total, bias.copy(), choice)
        if not total:
            break
        bias += step * excess / np.abs(excess).max()
    return best[1], best[2]


def _exchange(c: Floats, choice: NDArray[np.int64], excess: NDArray[np.int64]) -> None:
    """Move one item out of an over-full bin by the cheapest chain, in place.

    A chain a -> b -> ... moves one item of each bin to the next; the bins are a graph whose edges cost what the
    cheapest item of a bin costs more in another, and Bellman and Ford find its shortest path.
    """
    bins = c.shape[1]
    extra = c - c[np.arange(len(c)), choice][:, None]
    edge, item = np.full((bins, bins), np.inf), np.zeros((bins, bins), dtype=np.int64)
    for j in range(bins):
        members = np.flatnonzero(choice == j)
        if len(members):
            least = extra[members].argmin(axis=0)
            edge[j], item[j] = extra[members[least], np.arange(bins)], members[least]
    distance = np.where(excess > 0, 0.0, np.inf)
    before = np.full(bins, -1)
    for _ in range(bins - 1):
        through = distance[:, None] + edge
        nearer = through.min(axis=0) < distance - 1e-12 * np.abs(c).max()
        if not nearer.any():
            break
        before[nearer] = through.argmin(axis=0)[nearer]
        distance = np.where(nearer, through.min(axis=0), distance)
    to = int(np.where(excess < 0, distance, np.inf).argmin())
    excess[to] += 1
    while before[to] >= 0:
        origin = int(before[to])
        choice[item[origin, to]] = to
        to = origin
    excess[to] -= 1
