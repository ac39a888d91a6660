"""Assignment by a bias, against scipy's Hungarian solver and exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from quintic.core import DataError
from quintic.moe.assignment import balanced_assign


def hungarian(costs, capacity):
    wide = np.repeat(costs, capacity, axis=1)  # one column per place
    rows, columns = linear_sum_assignment(wide)
    return wide[rows, columns].sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_optimal_on_random_problems_of_any_shape_and_with_ties(bins, data):
    items = data.draw(st.integers(1, 20))
    g = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    costs = g.integers(-3, 4, (items, bins)) if data.draw(st.booleans()) else g.normal(size=(items, bins)) * 1e3
    capacity = g.multinomial(items, np.full(bins, 1 / bins))
    found = balanced_assign(costs, capacity, steps=data.draw(st.sampled_from([1, 30, 300])))
    assert np.bincount(found.bins, minlength=bins).tolist() == capacity.tolist()
    assert found.cost == pytest.approx(costs[np.arange(items), found.bins].sum())
    best = hungarian(costs, capacity)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.bound <= best + 1e-9 * abs(best) + 1e-9
    # The prices that are told are those of the bound and of the items that had to be moved.
    priced = costs + found.bias
    assert found.bound == pytest.approx(priced.min(1).sum() - capacity @ found.bias, rel=1e-9, abs=1e-9)
    excess = np.bincount(priced.argmin(1), minlength=bins) - capacity
    assert found.moved == excess[excess > 0].sum()


@pytest.mark.parametrize("n", [64, 128])
def test_the_prices_alone_come_close_on_large_problems(n):
    """What the bias update itself reaches: a bound within 1e-3 and nearly every item in place."""
    for seed in range(3):
        costs = np.random.default_rng(seed).random((n, n))
        found = balanced_assign(costs)
        best = hungarian(costs, np.ones(n, dtype=int))
        assert found.cost == pytest.approx(best, rel=1e-12)
        assert best * (1 - 1e-3) < found.bound <= best + 1e-9
        assert found.moved <= 3


def test_against_exhaustive_search():
    costs = np.random.default_rng(1).normal(size=(6, 6))
    best = min(costs[range(6), p].sum() for p in itertools.permutations(range(6)))
    assert balanced_assign(costs).cost == pytest.approx(best)


def test_uneven_items_are_spread_as_evenly_as_integers_allow():
    found = balanced_assign(np.random.default_rng(0).random((11, 4)))
    assert np.bincount(found.bins).tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("costs", "capacity", "message"),
    [
        ([1.0, 2.0], None, "matrix"),
        ([[np.nan, 1.0]], None, "finite"),
        ([[1.0, 2.0], [3.0, 4.0]], [2, 1], "add up to the 2 items"),
        ([[1.0, 2.0], [3.0, 4.0]], [0.5, 1.5], "integers"),
        ([[1.0, 2.0], [3.0, 4.0]], [3, -1], "integers >= 0"),
    ],
)
def test_bad_input(costs, capacity, message):
    with pytest.raises(DataError, match=message):
        balanced_assign(costs, capacity)
