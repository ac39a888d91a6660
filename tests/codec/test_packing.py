import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintic.codec.packing import (
    digit_bits,
    pack,
    pack_robust,
    rank_subset,
    unpack,
    unpack_robust,
    unrank_subset,
)
from quintic.core import CodecError
from quintic.core.counter_rng import Stream

DIGITS = st.lists(st.integers(1, 10**9).flatmap(lambda r: st.tuples(st.integers(0, r - 1), st.just(r))), max_size=30)


@given(DIGITS, st.integers(0, 3))
def test_digits_come_back_from_bytes(pairs, spare):
    digits, radices = [p[0] for p in pairs], [p[1] for p in pairs]
    size = (digit_bits(math.prod(radices)) + 7) // 8 + spare
    assert unpack(pack(digits, radices, size), radices, size) == digits
    size = (sum(map(digit_bits, radices)) + 7) // 8 + spare
    assert unpack_robust(pack_robust(digits, radices, size), radices) == digits


@settings(max_examples=30)
@given(DIGITS)
def test_a_prefix_gives_the_first_digits(pairs):
    digits, radices = [p[0] for p in pairs], [p[1] for p in pairs]
    size = (digit_bits(math.prod(radices)) + 7) // 8
    data = pack(digits, radices, size)
    for cut in range(size):
        got = unpack(data[:cut], radices, size)
        assert got == digits[: len(got)]


def test_a_prefix_loses_no_more_digits_than_its_bits():
    stream, radices = Stream(0, "prefix"), [1000] * 40
    for i in range(20):
        digits = stream.integers(40 * i, 40, 1000).tolist()
        data = pack(digits, radices, 50)
        for cut in range(0, 50, 7):
            # 9.97 bits a digit; one more may be open between two cells.
            assert len(unpack(data[:cut], radices, 50)) >= 8 * cut // 10 - 1


@given(st.binary(min_size=4, max_size=4))
def test_every_sequence_of_bytes_is_the_code_of_digits(data):
    radices = [7, 5, 1000, 3]
    digits = unpack(data, radices, 4)
    assert len(digits) == 4 and all(0 <= d < r for d, r in zip(digits, radices, strict=True))


@pytest.mark.parametrize("n,m", [(7, 3), (9, 1), (6, 6), (8, 4)])
def test_ranks_count_all_subsets_once(n, m):
    ranks = {rank_subset(items): list(items) for items in itertools.combinations(range(n), m)}
    assert sorted(ranks) == list(range(math.comb(n, m)))
    assert all(unrank_subset(rank, m) == items for rank, items in ranks.items())


@given(st.integers(1, 60), st.integers(0, 10**40))
def test_large_ranks_come_back(m, rank):
    assert rank_subset(unrank_subset(rank, m)) == rank


def test_an_impossible_index_is_an_error_or_wraps():
    with pytest.raises(CodecError, match="index 3"):
        unpack_robust(bytes([0b11000000]), [3])
    assert unpack_robust(bytes([0b11000000]), [3], strict=False) == [0]


def test_a_flipped_bit_spoils_one_robust_digit():
    radices = [16] * 8
    data = bytearray(pack_robust([1, 2, 3, 4, 5, 6, 7, 8], radices, 4))
    data[1] ^= 1
    assert unpack_robust(bytes(data), radices) == [1, 2, 3, 5, 5, 6, 7, 8]
