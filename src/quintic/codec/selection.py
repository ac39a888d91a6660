"""Which atoms carry a wanted shift: the rules of the paper, of the post and of Turbo-DDCM.

Knowing x_0, the true reverse step has mean mu(x) + shift with shift = b (x_0 - E[x_0 | x]), where DDPM has mu(x): the
noise must carry it, a = shift / std (post 10711). Any other wish is an ``a`` as well (:mod:`quintic.codec.guidance`).
The score of an atom is <a, atom>.

* ``Single``: one atom. ``argmax`` takes the best score (DDCM). ``softmax`` draws with probability proportional to
  exp(<a, atom>): atoms are drawn from N(0, I) and these weights are N(a, I) over N(0, I), so that the noise tends to
  N(a, I), the true posterior step, as K grows. ``literal`` draws with the post's exp(-|atom - a|^2 / 2): on the same
  atoms its limit is the product of the two densities, N(a / 2, I / 2); for atoms of equal length it is ``softmax``.
* ``Pursuit(M, C)``: the paper's matching pursuit, convex combinations sqrt(g) current + sqrt(1 - g) atom of unit
  variance, g on a grid of C bits; M log2 K + (M - 1) C bits.
* ``Signed(M)``: Turbo-DDCM, the M largest |<a, atom>| with their signs, all of one weight; log2 binom(K, M) + M bits.
  In an orthogonal codebook that is the exact least-squares choice.
* ``Grouped(M)``: the book cut into M equal groups, of each the atom of largest |<a, atom>| with its sign, all of one
  weight; the sum of log2(2 K / M). A little less of ``a`` than M atoms taken anywhere, for fewer bits still: with 784
  atoms a bit carries 3 % more at M = 4 and 5 % at M = 16, which is why the presets use it.

Arrays: n images, d values, K atoms; ``ids`` is (n, symbols of the rule).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quintic.codec.codebook import Array, Codebook
from quintic.codec.packing import rank_subset, unrank_subset
from quintic.core import ConfigError, suggest
from quintic.core.counter_rng import Stream

__all__ = ["DRAWS", "Grouped", "Ids", "Pursuit", "Rule", "Signed", "Single"]

Ids = NDArray[np.int64]
_SIGNS = np.array([1.0, -1.0])
DRAWS = ("argmax", "softmax", "literal")


class Rule(Protocol):
    """How one step is coded."""

    def choose(self, wanted: Array, book: Codebook, draws: Stream | None = None) -> Ids:
        """Symbols (n, symbols) for wanted noise (n, d); ``draws`` gives the chance of rules that draw."""
        ...

    def noise(self, ids: Ids, book: Codebook) -> Array:
        """The noise (n, d) that symbols stand for."""
        ...

    def radices(self, size: int, *, joint: bool) -> list[int]:
        """Radices of the digits of one image in a book of ``size`` atoms, joint or each atom by itself."""
        ...

    def to_digits(self, ids: list[int], *, joint: bool) -> list[int]:
        """Symbols of one image to digits."""
        ...

    def from_digits(self, digits: list[int], *, joint: bool) -> list[int]:
        """The inverse."""
        ...


@dataclass(frozen=True)
class Single:
    """One atom."""

    draw: str = "argmax"

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise ConfigError(f"unknown selection {self.draw!r}{suggest(self.draw, DRAWS)}")

    def choose(self, wanted: Array, book: Codebook, draws: Stream | None = None) -> Ids:
        """(n, d) -> (n, 1)."""
        scores = book.inner(wanted)
        if self.draw == "literal":
            scores = scores - 0.5 * book.squared_norms()
        if self.draw != "argmax":
            if draws is None:
                raise ConfigError(f"selection {self.draw!r} draws at random and needs a stream")
            # The largest of log-weights plus Gumbel noise is a draw with those weights.
            uniform = draws.uniform(0, scores.size).reshape(scores.shape)
            scores = scores - np.log(-np.log(uniform))
        return scores.argmax(1)[:, None].astype(np.int64)

    def noise(self, ids: Ids, book: Codebook) -> Array:
        """(n, 1) -> (n, d)."""
        return book.combine(ids, np.ones(ids.shape))

    def radices(self, size: int, *, joint: bool) -> list[int]:
        """K."""
        return [size]

    def to_digits(self, ids: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return ids

    def from_digits(self, digits: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return digits


@dataclass(frozen=True)
class Pursuit:
    """M atoms, the later ones mixed in with a coefficient of C bits; code 0 of a coefficient adds nothing."""

    atoms: int
    coefficient_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.atoms <= 64 or not 1 <= self.coefficient_bits <= 8:
            raise ConfigError(
                f"matching pursuit takes 1 to 64 atoms and 1 to 8 bits, found {self.atoms} and {self.coefficient_bits}"
            )

    def _grid(self) -> Array:
        # linspace(0, 1, 2^C) as the paper has it; its last value, 1, would add nothing.
        return np.arange(1 << self.coefficient_bits) / ((1 << self.coefficient_bits) - 1.0)

    def choose(self, wanted: Array, book: Codebook, draws: Stream | None = None) -> Ids:
        """(n, d) -> (n, 2 M - 1): first atom, then pairs of atom and code."""
        scores, d = book.inner(wanted), book.dimension
        norms = book.squared_norms() / d
        n = len(wanted)
        ids = np.zeros((n, 2 * self.atoms - 1), dtype=np.int64)
        ids[:, 0] = (scores / np.sqrt(norms)).argmax(1)
        rows = np.arange(n)
        grid = self._grid()
        for m in range(1, self.atoms):
            current = self.noise(ids[:, : 2 * m - 1], book)
            kept = (wanted * current).sum(1)
            cross = book.inner(current) / d
            best, code, atom = kept.copy(), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
            for c in range(1, len(grid)):
                g = grid[c]
                square = g + (1.0 - g) * norms + 2.0 * math.sqrt(g * (1.0 - g)) * cross
                value = (math.sqrt(g) * kept[:, None] + math.sqrt(1.0 - g) * scores) / np.sqrt(square)
                winner = value.argmax(1)
                better = value[rows, winner] > best
                best = np.where(better, value[rows, winner], best)
                code, atom = np.where(better, c, code), np.where(better, winner, atom)
            ids[:, 2 * m - 1], ids[:, 2 * m] = atom, code
        return ids

    def noise(self, ids: Ids, book: Codebook) -> Array:
        """(n, 2 m - 1) -> (n, d), of unit mean square."""
        current = _unit(book.combine(ids[:, :1], np.ones((len(ids), 1))))
        grid = self._grid()
        for j in range(1, ids.shape[1], 2):
            g = grid[ids[:, j + 1]]
            atom = book.combine(ids[:, j : j + 1], np.sqrt(1.0 - g)[:, None])
            mixed = _unit(np.sqrt(g)[:, None] * current + atom)
            current = np.where((ids[:, j + 1] == 0)[:, None], current, mixed)
        return current

    def radices(self, size: int, *, joint: bool) -> list[int]:
        """K, then K and 2^C for each further atom."""
        return [size] + [size, 1 << self.coefficient_bits] * (self.atoms - 1)

    def to_digits(self, ids: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return ids

    def from_digits(self, digits: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return digits


@dataclass(frozen=True)
class Signed:
    """M atoms with signs; a symbol is 2 atom + (1 if negative), in the order of the atoms."""

    atoms: int

    def __post_init__(self) -> None:
        if self.atoms < 1:
            raise ConfigError(f"a signed selection takes at least 1 atom, found {self.atoms}")

    def choose(self, wanted: Array, book: Codebook, draws: Stream | None = None) -> Ids:
        """(n, d) -> (n, M)."""
        if self.atoms > book.size:
            raise ConfigError(f"{self.atoms} different atoms of a codebook of {book.size}")
        scores = book.inner(wanted)
        largest = np.sort(np.argpartition(-np.abs(scores), self.atoms - 1, axis=1)[:, : self.atoms], axis=1)
        return (2 * largest + (np.take_along_axis(scores, largest, 1) < 0)).astype(np.int64)

    def noise(self, ids: Ids, book: Codebook) -> Array:
        """(n, M) -> (n, d), of unit mean square."""
        weights = _SIGNS.take(ids & 1)
        # Two flipped bits of a robust file may name one atom twice, with opposite signs: still a vector to divide by.
        return _unit(book.combine(ids >> 1, weights))

    def radices(self, size: int, *, joint: bool) -> list[int]:
        """The set of atoms with all signs, or each atom with its sign."""
        return [math.comb(size, self.atoms) << self.atoms] if joint else [2 * size] * self.atoms

    def to_digits(self, ids: list[int], *, joint: bool) -> list[int]:
        """Rank of the set, then the signs."""
        if not joint:
            return ids
        signs = 0
        for symbol in ids:
            signs = signs << 1 | symbol & 1
        return [rank_subset([symbol >> 1 for symbol in ids]) << self.atoms | signs]

    def from_digits(self, digits: list[int], *, joint: bool) -> list[int]:
        """The inverse."""
        if not joint:
            return digits
        atoms = unrank_subset(digits[0] >> self.atoms, self.atoms)
        return [2 * atom + (digits[0] >> self.atoms - 1 - i & 1) for i, atom in enumerate(atoms)]


@dataclass(frozen=True)
class Grouped:
    """One atom with a sign of each of M groups; a symbol is 2 (atom - first of its group) + (1 if negative)."""

    atoms: int

    def __post_init__(self) -> None:
        if self.atoms < 1:
            raise ConfigError(f"a grouped selection takes at least 1 atom, found {self.atoms}")

    def choose(self, wanted: Array, book: Codebook, draws: Stream | None = None) -> Ids:
        """(n, d) -> (n, M)."""
        scores = book.inner(wanted)
        if book.size % self.atoms:
            scores = scores.take(_groups(book.size, self.atoms), 1)
        else:
            scores = scores.reshape(len(scores), self.atoms, -1)
        atoms = np.abs(scores).argmax(2)
        return 2 * atoms + (scores.take(_starts(*scores.shape) + atoms) < 0)

    def noise(self, ids: Ids, book: Codebook) -> Array:
        """(n, M) -> (n, d), of unit mean square."""
        noise = book.combine((ids >> 1) + _groups(book.size, self.atoms)[:, 0], _SIGNS.take(ids & 1))
        return noise * math.sqrt(1.0 / self.atoms) if book.single else _unit(noise)

    def radices(self, size: int, *, joint: bool) -> list[int]:
        """Twice the size of each group."""
        return [2 * (b - a) for a, b in itertools.pairwise(_bounds(size, self.atoms))]

    def to_digits(self, ids: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return ids

    def from_digits(self, digits: list[int], *, joint: bool) -> list[int]:
        """As they are."""
        return digits


def _bounds(size: int, groups: int) -> list[int]:
    """Where groups begin, and the end: all whole, as equal as can be."""
    if groups > size:
        raise ConfigError(f"{groups} groups of a codebook of {size}")
    return [group * size // groups for group in range(groups + 1)]


@functools.lru_cache(8)
def _groups(size: int, groups: int) -> NDArray[np.int32]:
    """Numbers of the members of each group, (groups, as many as the largest has): of smaller ones the last again."""
    bounds = np.array(_bounds(size, groups), dtype=np.int32)
    widest = np.arange(np.diff(bounds).max(), dtype=np.int32)
    return np.minimum(bounds[:-1, None] + widest, bounds[1:, None] - 1)


@functools.lru_cache(8)
def _starts(n: int, groups: int, widest: int) -> NDArray[np.int64]:
    """Places of the first member of each group of each image: (n, groups)."""
    return np.arange(0, n * groups * widest, widest).reshape(n, groups)


def _unit(x: Array) -> Array:
    """Each row divided by its root mean square; sums are of whole numbers, hence the same in any order."""
    whole = np.rint(x * 2.0**16).astype(np.int64)
    squares = np.square(whole).sum(1, keepdims=True).astype(np.float64) * 2.0**-32
    return x / np.sqrt(np.maximum(squares / x.shape[1], 2.0**-16))
