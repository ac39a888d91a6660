"""Codebooks: vectors that both sides know, drawn once from a counter (post 10711: "DDPM + codebook = discrete code").

A step of DDPM goes to mu(x) + sigma z with normal z; here z is one of K fixed vectors, or a combination of some, and
which one is the code. Two kinds, both pure functions of (seed, step) with no framework's random numbers in them:

* ``GaussianCodebook``: K independent normal vectors, as in the paper, one book per step, or one shared by all. Atoms
  are made when they are needed; choosing takes K d operations.
* ``OrthogonalCodebook``: K = d rows of sqrt(d) Q, Q = H D_2 P_2 H D_1 P_1 with random signs D,
  permutations P, and H block-diagonal of Hadamard matrices whose sizes are powers of two that add up to d. Every atom
  has length sqrt(d), any two are at right angles (to 1e-7), entries are close to normal, all d inner products take
  O(d log d) operations, and what is stored is O(d). The sign of an atom is one bit more.

Noise is made of elementwise operations and exact sums: the same bits everywhere. In single precision, at half the cost,
P_1 is left out and P_2 common to all steps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quintic.core import ConfigError
from quintic.core.counter_rng import Stream

__all__ = ["Codebook", "GaussianCodebook", "OrthogonalCodebook", "start_noise"]

Array = NDArray[np.float64]
"""Of doubles, or for plans in single precision of these."""
Order = NDArray[np.int32]
_ROUNDS = 2
_DENSE = 256  # up to this size blocks of Hadamard matrices are multiplied by as one matrix
_FEW = 32  # atoms whose rows are added up as they are
_CHUNK = 1 << 18  # numbers of a Gaussian codebook that exist at one time


def precision(single: bool) -> type[np.float64]:
    """The type of numbers."""
    return np.float32 if single else np.float64  # type: ignore[return-value]


class Codebook(Protocol):
    """K vectors of dimension d."""

    size: int
    dimension: int
    single: bool
    """In single precision."""

    def inner(self, vectors: Array) -> Array:
        """Inner products (n, K) of (n, d) vectors with every atom."""
        ...

    def squared_norms(self) -> Array:
        """(K,)."""
        ...

    def combine(self, ids: NDArray[np.int64], weights: Array) -> Array:
        """sum_j weights[:, j] * atom[ids[:, j]]: (n, m) and (n, m) to (n, d)."""
        ...


@functools.lru_cache(4)
def start_noise(seed: int, dimension: int) -> Array:
    """x_T, which is not transmitted: (d,), not to be written to."""
    noise = Stream(seed, "codec start").normal(0, dimension)
    noise.flags.writeable = False
    return noise


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

    single = False

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
def _sylvester(size: int, single: bool) -> Array:
    """Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix.astype(precision(single))


@functools.cache
def _blocks(size: int) -> list[int]:
    """Powers of two that add up to a size, largest first."""
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


@functools.cache
def _diagonal(size: int, single: bool) -> Array:
    """Hadamard matrices of the blocks of a size along a diagonal."""
    matrix, first = np.zeros((size, size), dtype=precision(single)), 0
    for block in _blocks(size):
        matrix[first : first + block, first : first + block] = _sylvester(block, single)
        first += block
    return matrix


@functools.cache
def _factors(size: int) -> tuple[int, list[int]]:
    """A size as a number up to 64, if it can be, and powers of two up to 16, which all its blocks have in common."""
    factors = []
    while size > 64 and size % 2 == 0:
        factors.append(math.gcd(size, 16))
        size //= factors[-1]
    return size, factors


@functools.cache
def _stages(size: int, single: bool) -> list[tuple[Array, tuple[int, ...]]]:
    """Matrices whose products one after the other are blocks of Hadamard matrices, and the shapes they multiply."""
    (first, factors), after, stages = _factors(size), 1, []
    for factor in (*factors, first):
        matrix = _diagonal(first, single) if len(stages) == len(factors) else _sylvester(factor, single)
        stages.append((matrix, (-1, factor, after) if after > 1 else (-1, factor)))
        after *= factor
    return stages


def _hadamard(x: Array) -> Array:
    """Blocks of Hadamard matrices, without the roots of their sizes, along the second axis of (n, size)."""
    size, single = x.shape[1], x.dtype == np.float32
    if _factors(size)[0] > _DENSE:
        starts = itertools.accumulate(_blocks(size), initial=0)
        return np.concatenate([_hadamard(x[:, a:b]) for a, b in itertools.pairwise(starts)], axis=1)
    y = x
    for matrix, shape in _stages(size, single):
        y = matrix @ y.reshape(shape) if len(shape) == 3 else y.reshape(shape) @ matrix
    return y.reshape(x.shape)


def _hadamard_of(ids: NDArray[np.int64], weights: Array, size: int) -> Array:
    """:func:`_hadamard` of vectors (n, size) with weights (n, m) at places (n, m): if they are few, a sum of rows."""
    n, m = ids.shape
    after = math.gcd(size, _DENSE)
    before, single = size // after, weights.dtype == np.float32
    if before > _DENSE or m > _FEW:
        places = ids + np.arange(0, n * size, size)[:, None]
        sums = np.bincount(places.ravel(), weights.ravel(), n * size)
        return _hadamard(sums.astype(weights.dtype, copy=False).reshape(n, size))
    row, column = np.divmod(ids, after)
    rows = _diagonal(before, single).take(row, 0)
    rows *= weights[:, :, None]
    return (rows.transpose(0, 2, 1) @ _sylvester(after, single).take(column, 0)).reshape(n, size)


def _order(words: NDArray[np.uint64]) -> tuple[Order, Order]:
    """The permutation that sorts words, and its inverse."""
    order = np.argsort(words, kind="stable").astype(np.int32)
    back = np.empty_like(order)
    back[order] = np.arange(len(order), dtype=np.int32)
    return order, back


@functools.lru_cache(4)
def _common_order(dimension: int, seed: int) -> tuple[Order, Order]:
    """That between the rounds of all codebooks in single precision, so that it stays at hand."""
    return _order(Stream(seed, "orthogonal codebook", "order").words(0, dimension))


class OrthogonalCodebook:
    """d atoms of length sqrt(d), at right angles to each other.

    Args:
        dimension: d = K.
        seed: Of the stream.
        step: Its number; None is the book shared by all steps.
        single: Compute in single precision; weights must then be 1 or -1.

    Example:
        >>> book = OrthogonalCodebook(dimension=12, seed=0, step=0)
        >>> atoms = book.combine(np.arange(12)[:, None], np.ones((12, 1)))
        >>> bool(np.allclose(atoms @ atoms.T, 12 * np.eye(12), atol=1e-5))
        True
    """

    def __init__(self, dimension: int, seed: int, step: int | None, *, single: bool = False) -> None:
        if dimension < 1:
            raise ConfigError(f"a codebook needs a dimension of at least 1, found {dimension}")
        self.size = self.dimension = dimension
        self.single = single
        blocks = _blocks(dimension)
        scales = np.concatenate([np.full(block, math.sqrt(1.0 / block)) for block in blocks])
        stream = Stream(seed, "orthogonal codebook", "shared" if step is None else step)
        self._rounds: list[tuple[Array, Order | None, Order | None]] = []
        for i in range(_ROUNDS):
            words = stream.words(i * dimension, dimension)
            # The top bit is the sign, the others order the entries; a single block needs no shuffling.
            signed = np.where(words >> np.uint64(63), -scales, scales).astype(precision(single))
            order = back = None
            if single:
                order, back = _common_order(dimension, seed) if i else (None, None)
            elif len(blocks) > 1:
                order, back = _order(words << np.uint64(1))
            self._rounds.append((signed, order, back))

    def inner(self, vectors: Array) -> Array:
        """(n, d) -> (n, d)."""
        x: Array = np.asarray(vectors, dtype=precision(self.single))
        for signed, order, _ in self._rounds:
            mixed: Array = x if order is None else x.take(order, 1)
            x = _hadamard(mixed * signed)
        x *= math.sqrt(self.dimension)
        return x

    def squared_norms(self) -> Array:
        """(d,), all d."""
        return np.full(self.size, float(self.dimension))

    def combine(self, ids: NDArray[np.int64], weights: Array) -> Array:
        """(n, m) and (n, m) -> (n, d): the transform run backwards on a sparse vector."""
        d = self.dimension
        # In whole multiples of a power of two, so that sums are exact and the same in whatever order they are taken.
        bits = 24
        if self.single:
            # At most 2^24 for the root of block times atoms, which bounds the magnitudes of a block together.
            bits = 23 - ((_blocks(d)[0] * ids.shape[1] - 1).bit_length() + 1) // 2
        whole = weights * 2.0**bits if self.single else np.rint(weights * 2.0**bits)
        x = _hadamard_of(ids, whole.astype(precision(self.single), copy=False), d)
        for i, (signed, _, back) in enumerate(reversed(self._rounds)):
            if i:
                x = _hadamard(np.rint(x, out=x))
            x *= signed
            if back is not None:
                x = x.take(back, 1)
        x *= math.sqrt(d) * 2.0**-bits
        return x
