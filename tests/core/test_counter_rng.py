"""The counter generator against Random123's known answers, scipy's quantile and its own fixed vectors."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from quintic.core.counter_rng import Stream, _log, _normal_quantile

ONES = 0xFFFFFFFFFFFFFFFF
# Random123's kat_vectors for philox4x64-10: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
    ([ONES] * 4, [ONES] * 2, [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]
FIXED_WORDS = [14763286957634458674, 206965694051265968, 17651685560848468398]
FIXED_INTEGERS = [800, 11, 956, 37, 527, 663, 634, 670]
FIXED_UNIFORM = ["0x1.99c3768995eb2p-1", "0x1.6fa519e14f160p-7", "0x1.e9eec4fd6a87ap-1"]
FIXED_NORMAL = ["0x1.af7e94d4e4a03p-1", "-0x1.2434653d20a6bp+1", "0x1.b73e09b5a4ddep+0"]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_are_philox4x64_10(counter, key, expected):
    stream = Stream(0)
    stream._key = np.array(key, dtype=np.uint64)
    block = sum(word << (64 * i) for i, word in enumerate(counter))
    assert stream.words(4 * block, 4).tolist() == expected


def test_fixed_vectors():
    """These numbers are a promise: weights, data orders and coded images depend on them."""
    stream = Stream(1234, "test", 7)
    assert stream.words(0, 3).tolist() == FIXED_WORDS
    assert stream.integers(0, 8, 1000).tolist() == FIXED_INTEGERS
    assert [x.hex() for x in stream.uniform(0, 3).tolist()] == FIXED_UNIFORM
    assert [x.hex() for x in stream.normal(0, 3).tolist()] == FIXED_NORMAL


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_any_slice_of_the_stream_is_the_same(start, before, count):
    stream = Stream(3, "slices")
    assert (stream.words(start + before, count) == stream.words(start, before + count)[before:]).all()


def test_streams_differ_by_seed_and_by_labels():
    keys = [
        Stream(0)._key, Stream(1)._key, Stream(0, "a")._key, Stream(0, "a", "b")._key, Stream(0, "ab")._key,
        Stream(0, 1)._key, Stream(0, "1")._key, Stream(-1)._key,
    ]  # fmt: skip
    assert len({tuple(key.tolist()) for key in keys}) == len(keys)


def test_log_and_quantile_are_accurate():
    u = np.concatenate([np.logspace(-16.2, -0.001, 4001), 1 - np.logspace(-15, -0.31, 2001)])
    assert np.abs(_log(u) - np.log(u)).max() < 2e-14
    exact = scipy.special.ndtri(u)
    assert np.abs(_normal_quantile(u) - exact).max() < 1e-13 * 9


def test_distributions():
    stream = Stream(5, "distributions")
    assert scipy.stats.kstest(stream.normal(0, 100_000), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(stream.uniform(0, 100_000), "uniform").pvalue > 1e-3
    counts = np.bincount(stream.integers(0, 100_000, 17), minlength=17)
    assert counts.size == 17 and scipy.stats.chisquare(counts).pvalue > 1e-3
    assert stream.integers(0, 10, 1).tolist() == [0] * 10
