"""Order: a permutation per epoch, a pure function of its key, even in its spread."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from quintic.data.order import Order


@given(st.integers(1, 5000), st.integers(0, 2**31), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(Order(n, seed, "f").examples(epoch * n, n).tolist()) == list(range(n))


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 100))
def test_slices_agree_with_the_whole(n, start, count):
    whole = Order(n, 0, "f").examples(0, start + count)
    assert Order(n, 0, "f").examples(start, count).tolist() == whole[start:].tolist()


def test_seed_data_and_epoch_each_change_the_order():
    base = Order(1000, 0, "f").examples(0, 1000)
    for other in (
        Order(1000, 1, "f").examples(0, 1000),
        Order(1000, 0, "g").examples(0, 1000),
        Order(1000, 0, "f").examples(1000, 1000),
    ):
        assert (other == base).mean() < 0.02


@pytest.mark.parametrize("n", [5, 16, 37])
def test_places_are_even(n):
    """Over many keys, example 0 and example n - 1 land everywhere equally often, and pairs are not tied."""
    orders = np.array([Order(n, seed, "f").examples(0, n) for seed in range(3000)])
    for example in (0, n - 1):
        places = np.argmax(orders == example, axis=1)
        assert scipy.stats.chisquare(np.bincount(places, minlength=n)).pvalue > 1e-4
    steps = (orders[:, 1] - orders[:, 0]) % n
    assert scipy.stats.chisquare(np.bincount(steps, minlength=n)[1:]).pvalue > 1e-4


def test_fixed_vector():
    """A promise to old runs: a resume must see the same order."""
    assert Order(11, 7, "fixed").examples(8, 6).tolist() == [8, 5, 0, 0, 4, 1]
