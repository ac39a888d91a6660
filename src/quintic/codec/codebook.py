"""Codebooks: vectors that both sides know, drawn once from a counter (post 10711: "DDPM + codebook = discrete code").

A step of DDPM goes to mu(x) + sigma z with normal z; here z is one of K fixed vectors, or a combination of some, and
which one is the code. Two kinds, both pure functions of (seed, step) with no framework's random numbers in them:

* ``GaussianCodebook``: K independent normal vectors, as in the paper, one book per step, or one shared by all. Atoms
  are made when they are needed; choosing takes K d operations.
* ``OrthogonalCodebook``: K = d rows of sqrt(d) Q, Q = H D_2 P_2 H D_1 P_1 with random signs D,
  permutations P, and H block-diagonal of Hadamard matrices whose sizes are powers of two that add up to d. Every atom
  has length sqrt(d), any two are at right angles (to 1e-7), entries are close to normal, all d inner products take
  O(d log d) operations, and what is stored is O(d). The sign of an atom is one bit more.

Noise is made of elementwise operations and exact sums of doubles: the same bits everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream

__all__ = ["Codebook", "GaussianCodebook", "OrthogonalCodebook", "start_noise"]

Array = NDArray[np.float64]
_ROUNDS = 2
_CHUNK = 1 << 18  # numbers of a Gaussian codebook that exist at one time


class Codebook(Protocol):
    """K vectors of dimension d."""

    size: int
    dimension: int

    def inner(self, vectors: Array) -> Array:
        """Inner products (n, K) of (n, d) vectors with every atom."""
        ...

    def squared_norms(self) -> Array:
        """(K,)."""
        ...

    def combine(self, ids: NDArray[np.int64], weights: Array) -> Array:
        """sum_j weights[:, j] * atom[ids[:, j]]: (n, m) and (n, m) to (n, d)."""
        ...


def start_noise(seed: int, dimension: int) -> Array:
    """x_T, which is not transmitted: (d,)."""
    return Stream(seed, "codec start").normal(0, dimension)


class GaussianCodebook:
    """K independent standard normal vectors.

    Args:
        dimension: d.
        size: K.
        seed: Of the stream.
        step: Its number; None is the book shared by all steps, which an encoder keeps in memory.

    Example:
        >>> book = GaussianCodebook(dimension=4, size=8, seed=0, step=3)
        >>> atom = book.combine(np.array([[5]]), np.ones((1, 1)))
        >>> bool(np.allclose(book.inner(atom)[0, 5], book.squared_norms()[5]))
        True
    """

    def __init__(self, dimension: int, size: int, seed: int, step: int | None) -> None:
        if dimension < 1 or not 2 <= size <= 1 << 24:
            raise ConfigError(f"a codebook needs 2 to 2^24 atoms of dimension 1 or more, found {size} of {dimension}")
        self.size = size
        self.dimension = dimension
        self._stream = Stream(seed, "codebook", "shared" if step is None else step)
        self._shared = step is None
        self._kept: Array | None = None

    def _make(self, first: int, count: int) -> Array:
        if self._kept is not None:
            return self._kept[first : first + count]
        return self._stream.normal(first * self.dimension, count * self.dimension).reshape(count, self.dimension)

    def _parts(self) -> Iterator[Array]:
        if self._shared and self._kept is None:
            self._kept = self._make(0, self.size)
        rows = max(1, _CHUNK // self.dimension)
        for first in range(0, self.size, rows):
            yield self._make(first, min(rows, self.size - first))

    def inner(self, vectors: Array) -> Array:
        """(n, d) -> (n, K)."""
        return np.concatenate([vectors @ part.T for part in self._parts()], axis=1)

    def squared_norms(self) -> Array:
        """(K,)."""
        return np.concatenate([np.square(part).sum(1) for part in self._parts()])

    def combine(self, ids: NDArray[np.int64], weights: Array) -> Array:
        """(n, m) and (n, m) -> (n, d), summed in the order given."""
        out = np.zeros((len(ids), self.dimension))
        made: dict[int, Array] = {}
        for j in range(ids.shape[1]):
            for row, atom in enumerate(ids[:, j].tolist()):
                if atom not in made:
                    made[atom] = self._make(atom, 1)[0]
                out[row] += weights[row, j] * made[atom]
        return out


@functools.cache
def _sylvester(size: int) -> Array:
    """Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@functools.cache
def _factors(block: int) -> list[int]:
    """A power of two as a product of as few powers of two up to 64 as there can be, about equal."""
    bits = block.bit_length() - 1
    parts = max(1, -(-bits // 6))
    return [1 << (i + 1) * bits // parts - i * bits // parts for i in range(parts)]


class OrthogonalCodebook:
    """d atoms of length sqrt(d), at right angles to each other.

    Args:
        dimension: d = K.
        seed: Of the stream.
        step: Its number; None is the book shared by all steps.

    Example:
        >>> book = OrthogonalCodebook(dimension=12, seed=0, step=0)
        >>> atoms = book.combine(np.arange(12)[:, None], np.ones((12, 1)))
        >>> bool(np.allclose(atoms @ atoms.T, 12 * np.eye(12), atol=1e-5))
        True
    """

    def __init__(self, dimension: int, seed: int, step: int | None) -> None:
        if dimension < 1:
            raise ConfigError(f"a codebook needs a dimension of at least 1, found {dimension}")
        self.size = self.dimension = dimension
        self._blocks = [1 << bit for bit in reversed(range(dimension.bit_length())) if dimension >> bit & 1]
        self._scales = np.concatenate([np.full(b, math.sqrt(1.0 / b)) for b in self._blocks])
        stream = Stream(seed, "orthogonal codebook", "shared" if step is None else step)
        self._signs, self._orders = [], []
        for i in range(_ROUNDS):
            words = stream.words(i * dimension, dimension)
            # The top bit is the sign, the others order the entries; a single block needs no shuffling.
            self._signs.append(1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64))
            several = len(self._blocks) > 1
            self._orders.append(np.argsort(words << np.uint64(1), kind="stable") if several else None)

    def _hadamard(self, x: Array) -> Array:
        """Without the roots of the sizes of blocks."""
        out, first = np.empty_like(x), 0
        for block in self._blocks:
            *factors, last = _factors(block)
            part, after = x[:, first : first + block].reshape(-1, last) @ _sylvester(last), block
            for factor in factors:
                # Along one axis of factor entries; those after it go along.
                after //= factor
                part = _sylvester(factor) @ part.reshape(-1, factor, after)
            out[:, first : first + block] = part.reshape(len(x), block)
            first += block
        return out

    def inner(self, vectors: Array) -> Array:
        """(n, d) -> (n, d)."""
        x = np.asarray(vectors, dtype=np.float64)
        for signs, order in zip(self._signs, self._orders, strict=True):
            x = self._hadamard((x if order is None else x.take(order, 1)) * signs) * self._scales
        return x * math.sqrt(self.dimension)

    def squared_norms(self) -> Array:
        """(d,), all d."""
        return np.full(self.size, float(self.dimension))

    def combine(self, ids: NDArray[np.int64], weights: Array) -> Array:
        """(n, m) and (n, m) -> (n, d): the transform run backwards on a sparse vector."""
        x = np.zeros((len(ids), self.dimension))
        rows = np.arange(len(ids))
        for j in range(ids.shape[1]):
            x[rows, ids[:, j]] += weights[:, j]
        for signs, order in zip(reversed(self._signs), reversed(self._orders), strict=True):
            # Whole multiples of 2^-24: their sums are exact, and so the same in whatever order they are taken.
            x = self._hadamard(np.rint(x * 2.0**24) * 2.0**-24) * (self._scales * signs)
            if order is not None:
                back = np.empty_like(x)
                back[:, order] = x
                x = back
        return x * math.sqrt(self.dimension)
