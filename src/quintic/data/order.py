"""The order of training examples: a keyed permutation per epoch, computed and never stored.

Example p of the endless sequence is perm_e(p mod n) with e = p div n, where perm_e is a Feistel network over
[0, n) keyed by (seed, data fingerprint, epoch). Any slice costs only its own length, so the position in the data is
one number, and neither a resume nor the number of ranks changes what comes next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quintic.core.counter_rng import Stream

__all__ = ["Order"]

_ROUNDS = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """Examples in a random order, each once per epoch.

    Args:
        n: Number of examples.
        seed: Any integer.
        fingerprint: Of the data: other data, other order.

    Example:
        >>> order = Order(5, seed=0, fingerprint="")
        >>> sorted(order.examples(0, 5).tolist()), sorted(order.examples(5, 5).tolist())
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(self, n: int, seed: int, fingerprint: str) -> None:
        assert n >= 1
        self._n = n
        self._seed = seed
        self._fingerprint = fingerprint
        # Two halves of equal width that together cover [0, n).
        self._half_bits = max(1, -(-(n - 1).bit_length() // 2))

    def examples(self, start: int, count: int) -> NDArray[np.int64]:
        """Examples at positions ``start`` to ``start + count - 1`` of the endless sequence."""
        positions = np.arange(start, start + count)
        epochs = positions // self._n
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._permute(positions[chosen] % self._n, int(epoch))
        return out

    def _permute(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        keys = Stream(self._seed, "order", self._fingerprint, epoch).words(0, _ROUNDS)
        value = self._network(index.astype(np.uint64), keys)
        # The network permutes a power of four; walk each value along its cycle until it is below n.
        while (outside := value >= self._n).any():
            value[outside] = self._network(value[outside], keys)
        return value.astype(np.int64)

    def _network(self, value: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = value >> bits, value & mask
        for key in keys:
            mixed = (right ^ key) * _MIX
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << bits) | right
