"""Whole numbers to bytes and back, so that any prefix of the bytes gives a prefix of the numbers.

Digits i_1, i_2, ... with radices R_1, R_2, ... are one fraction i_1/R_1 + i_2/(R_1 R_2) + ... in [0, 1), written as its
leading bits: no part of a bit is lost between digits, and n leading bits fix the fraction to 2^-n, hence the first
digits. Every sequence of bits is the code of some digits, so that no index can be impossible.

The *robust* form gives every digit ceil(log2 R) bits of its own: longer, but a flipped bit spoils one digit only.

Sets of M atoms out of K are digits too, by their rank in the combinatorial number system, c_1 < ... < c_M having rank
binom(c_1, 1) + ... + binom(c_M, M) (Turbo-DDCM counts ceil(log2 binom(K, M)) bits for them).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from quintic.core import CodecError

__all__ = ["digit_bits", "pack", "pack_robust", "rank_subset", "unpack", "unpack_robust", "unrank_subset"]


def pack(digits: Sequence[int], radices: Sequence[int], size: int) -> bytes:
    """Digits as a fraction.

    Args:
        digits: 0 <= digit < radix.
        radices: As many.
        size: Bytes to fill; 256^size must be at least the product of the radices.

    Example:
        >>> pack([2, 1], [3, 7], 1), unpack(bytes([183]), [3, 7], 1)
        (b'\\xb7', [2, 1])
    """
    value, product = 0, 1
    for digit, radix in zip(digits, radices, strict=True):
        assert 0 <= digit < radix
        value = value * radix + digit
        product *= radix
    assert product <= 1 << 8 * size
    return (-((-value << 8 * size) // product)).to_bytes(size, "big")


def unpack(data: bytes, radices: Sequence[int], size: int) -> list[int]:
    """The digits that ``data`` fixes: all of them if it is whole, the first ones if it was cut.

    Args:
        data: What :func:`pack` wrote, or a prefix.
        radices: Of all digits.
        size: Bytes of the whole.
    """
    bits = 8 * size
    missing = bits - 8 * len(data)
    assert missing >= 0
    low = int.from_bytes(data, "big") << missing
    high = low + (1 << missing) - 1
    mask = (1 << bits) - 1
    digits = []
    for radix in radices:
        low, high = low * radix, high * radix
        digit = low >> bits
        if digit != high >> bits:
            break
        digits.append(digit)
        low, high = low & mask, high & mask
    return digits


def digit_bits(radix: int) -> int:
    """Bits of a digit on its own."""
    return (radix - 1).bit_length()


def pack_robust(digits: Sequence[int], radices: Sequence[int], size: int) -> bytes:
    """Each digit in its own bits, most significant first, zeros to fill."""
    value, bits = 0, 0
    for digit, radix in zip(digits, radices, strict=True):
        assert 0 <= digit < radix
        value = value << digit_bits(radix) | digit
        bits += digit_bits(radix)
    assert bits <= 8 * size
    return (value << 8 * size - bits).to_bytes(size, "big")


def unpack_robust(data: bytes, radices: Sequence[int], *, strict: bool = True) -> list[int]:
    """The digits whose bits are all there.

    Raises:
        CodecError: A digit is not below its radix, and ``strict``; else it is taken modulo the radix.
    """
    value, total, used, digits = int.from_bytes(data, "big"), 8 * len(data), 0, []
    for radix in radices:
        used += digit_bits(radix)
        if used > total:
            break
        digit = (value >> total - used) & ((1 << digit_bits(radix)) - 1)
        if digit >= radix and strict:
            raise CodecError(f"the file is damaged: index {digit} where {radix - 1} is the largest")
        digits.append(digit % radix)
    return digits


def rank_subset(items: Sequence[int]) -> int:
    """Rank of a strictly increasing sequence among all of its length.

    Example:
        >>> rank_subset([0, 1, 2]), rank_subset([0, 1, 3]), unrank_subset(3, 3)
        (0, 1, [1, 2, 3])
    """
    assert all(a < b for a, b in itertools.pairwise(items))
    return sum(math.comb(item, i) for i, item in enumerate(items, start=1))


def unrank_subset(rank: int, length: int) -> list[int]:
    """The inverse of :func:`rank_subset`."""
    items = []
    for i in range(length, 0, -1):
        low, high = i - 1, 2 * i
        while math.comb(high, i) <= rank:
            low, high = high, 2 * high
        while high - low > 1:  # comb(low, i) <= rank < comb(high, i)
            middle = (low + high) // 2
            low, high = (middle, high) if math.comb(middle, i) <= rank else (low, middle)
        items.append(low)
        rank -= math.comb(low, i)
    return items[::-1]
