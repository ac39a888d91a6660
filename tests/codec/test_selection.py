import itertools
import math

import numpy as np
import pytest

from quintic.codec.codebook import GaussianCodebook, OrthogonalCodebook
from quintic.codec.schedule import Plan, paper_plan
from quintic.codec.selection import Grouped, Pursuit, Signed, Single
from quintic.core import ConfigError
from quintic.core.counter_rng import Stream


def noise_moments(draw, a, runs=1500, size=1 << 17):
    """Mean and covariance of the chosen noise over independent choices from one large codebook."""
    book = GaussianCodebook(len(a), size, 0, None)
    scores = book.inner(a[None])[0]
    rule = Single(draw)
    if draw == "argmax":
        return book.combine(np.array([[scores.argmax()]]), np.ones((1, 1)))[0], None
    ids = [rule.choose(a[None], book, Stream(i, "limit"))[0, 0] for i in range(runs // 10)]
    # The rest by the weights themselves, to keep the test quick; the draws above check that the rule has them.
    weight = scores if draw == "softmax" else scores - 0.5 * book.squared_norms()
    p = np.exp(weight - weight.max())
    ids += np.random.default_rng(0).choice(size, runs * 10, p=p / p.sum()).tolist()
    chosen = book.combine(np.array(ids)[:, None], np.ones((len(ids), 1)))
    return chosen.mean(0), np.cov(chosen.T)


def test_softmax_tends_to_the_true_posterior_step_and_the_literal_form_to_another():
    a = np.array([1.0, -0.7, 0.4])
    mean, covariance = noise_moments("softmax", a)
    np.testing.assert_allclose(mean, a, atol=0.05)
    np.testing.assert_allclose(covariance, np.eye(3), atol=0.07)
    mean, covariance = noise_moments("literal", a)
    np.testing.assert_allclose(mean, a / 2, atol=0.05)
    np.testing.assert_allclose(covariance, np.eye(3) / 2, atol=0.05)


def test_draws_follow_the_weights_of_softmax():
    book, a = GaussianCodebook(4, 6, 0, 0), np.array([[0.5, -0.5, 1.0, 0.2]])
    p = np.exp(book.inner(a)[0])
    p /= p.sum()
    ids = Single("softmax").choose(np.repeat(a, 20_000, 0), book, Stream(0, "draws"))[:, 0]
    np.testing.assert_allclose(np.bincount(ids, minlength=6) / 20_000, p, atol=0.012)


def test_the_literal_form_is_softmax_for_atoms_of_equal_length():
    book, a = OrthogonalCodebook(16, 0, 0), np.random.default_rng(0).normal(size=(50, 16))
    both = [Single(draw).choose(a, book, Stream(3)) for draw in ("softmax", "literal")]
    np.testing.assert_array_equal(*both)


def test_argmax_takes_the_best_atom_and_forgets_the_scale():
    book, a = GaussianCodebook(16, 40, 0, 0), np.random.default_rng(0).normal(size=(9, 16))
    ids = Single().choose(a, book)
    atoms = book.combine(np.arange(40)[:, None], np.ones((40, 1)))
    np.testing.assert_array_equal(ids[:, 0], (a @ atoms.T).argmax(1))
    np.testing.assert_array_equal(ids, Single().choose(100 * a, book))


def test_signed_atoms_of_an_orthogonal_book_are_the_least_squares_solution():
    book, a = OrthogonalCodebook(8, 0, 0), np.random.default_rng(0).normal(size=(6, 8))
    rule = Signed(2)
    ids = rule.choose(a, book)
    score = (a * rule.noise(ids, book)).sum(1)
    every = [[2 * i + s, 2 * j + t] for i in range(8) for j in range(i + 1, 8) for s in (0, 1) for t in (0, 1)]
    best = np.max([(a * rule.noise(np.tile(option, (6, 1)), book)).sum(1) for option in every], axis=0)
    np.testing.assert_allclose(score, best)
    np.testing.assert_allclose(np.square(rule.noise(ids, book)).mean(1), 1.0, atol=1e-4)


def test_matching_pursuit_improves_with_every_atom_and_agrees_with_a_search():
    book, a = GaussianCodebook(24, 20, 0, 0), np.random.default_rng(1).normal(size=(5, 24))
    scores = []
    for m in (1, 2, 4):
        rule = Pursuit(m, 3)
        ids = rule.choose(a, book)
        z = rule.noise(ids, book)
        np.testing.assert_allclose(np.square(z).mean(1), 1.0, atol=1e-4)
        scores.append((a * z).sum(1))
    assert (scores[1] >= scores[0] - 1e-9).all() and (scores[2] >= scores[1] - 1e-9).all()
    first = Pursuit(1, 3).choose(a, book)
    candidates = [
        np.concatenate([first, np.full((5, 1), k), np.full((5, 1), c)], axis=1) for k in range(20) for c in range(8)
    ]
    best = np.max([(a * Pursuit(2, 3).noise(option, book)).sum(1) for option in candidates], axis=0)
    np.testing.assert_allclose(scores[1], best, rtol=1e-3)


@pytest.mark.parametrize("rule", [Single(), Pursuit(3, 2), Signed(4), Grouped(4)])
@pytest.mark.parametrize("joint", [True, False])
def test_symbols_and_digits_are_inverses(rule, joint):
    book, a = GaussianCodebook(24, 50, 0, 0), np.random.default_rng(1).normal(size=(5, 24))
    radices = rule.radices(50, joint=joint)
    for ids in rule.choose(a, book).tolist():
        digits = rule.to_digits(ids, joint=joint)
        assert len(digits) == len(radices) and all(0 <= d < r for d, r in zip(digits, radices, strict=True))
        assert rule.from_digits(digits, joint=joint) == ids


@pytest.mark.parametrize(
    "plan,d,bits",
    [
        (paper_plan(1000, 64), 512 * 512, 999 * 6),
        (paper_plan(1000, 8192), 512 * 512, 999 * 13),
        (paper_plan(1000, 8192, atoms=2, coefficient_bits=3), 64 * 64 * 4, 999 * (2 * 13 + 3)),
        (paper_plan(1000, 8192, atoms=6, coefficient_bits=1), 64 * 64 * 4, 999 * (6 * 13 + 5)),
    ],
)
def test_bits_are_those_of_the_paper(plan, d, bits):
    assert plan.image_bits(d) == bits
    if d == 512 * 512 and plan.size == 64:
        assert round(bits / d, 4) == 0.0229


@pytest.mark.parametrize("m,bits", [(45, 489), (100, 975), (150, 1377), (300, 2455)])
def test_bits_of_signed_atoms_are_those_of_turbo(m, bits):
    """ceil(log2 binom(K, M)) + M per step, K = 16384, as its code counts."""
    plan = Plan((-100, 0), (m,), book="gaussian", size=16384)
    assert plan.image_bits(16384) == math.ceil(math.log2(math.comb(16384, m))) + m == bits


def test_grouped_atoms_are_the_best_of_each_group():
    book, a = OrthogonalCodebook(10, 0, 0), np.random.default_rng(0).normal(size=(6, 10))
    rule = Grouped(3)  # atoms 0-2, 3-5, 6-9
    assert rule.radices(10, joint=True) == rule.radices(10, joint=False) == [6, 6, 8]
    ids = rule.choose(a, book)
    every = np.array(list(itertools.product(range(6), range(6), range(8))))
    best = np.max([(a * rule.noise(np.tile(option, (6, 1)), book)).sum(1) for option in every], axis=0)
    np.testing.assert_allclose((a * rule.noise(ids, book)).sum(1), best)
    np.testing.assert_allclose(np.square(rule.noise(ids, book)).mean(1), 1.0, atol=1e-4)


@pytest.mark.parametrize("m,gain", [(4, 1.03), (16, 1.05)])
def test_a_bit_carries_more_in_grouped_atoms_than_in_a_set(m, gain):
    """Of normal inner products with 784 orthogonal atoms, the squared cosine in bits over the bits spent."""
    scores = np.random.default_rng(0).normal(size=(4000, 784))

    def worth(rule, bits):
        ids = rule.choose(scores, _Axes())
        cosine = np.square((scores * rule.noise(ids, _Axes())).sum(1)) / np.square(scores).sum(1) / 784
        return -392 * np.log2(1 - cosine.mean()) / bits

    signed = worth(Signed(m), math.log2(math.comb(784, m) << m))
    grouped = worth(Grouped(m), math.log2(math.prod(Grouped(m).radices(784, joint=True))))
    assert 0.69 < signed < grouped < 0.77
    assert grouped / signed == pytest.approx(gain, abs=0.01)


class _Axes:
    """The orthogonal codebook of the coordinate axes."""

    size = dimension = 784
    single = False

    def inner(self, vectors):
        return math.sqrt(784) * vectors

    def combine(self, ids, weights):
        out = np.zeros((len(ids), 784))
        np.put_along_axis(out, ids, weights * math.sqrt(784), 1)
        return out


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        Single("softmx")
    with pytest.raises(ConfigError, match="needs a stream"):
        Single("softmax").choose(np.zeros((1, 4)), GaussianCodebook(4, 3, 0, 0))
    with pytest.raises(ConfigError, match="5 different atoms of a codebook of 4"):
        Signed(5).choose(np.zeros((1, 4)), OrthogonalCodebook(4, 0, 0))
    with pytest.raises(ConfigError, match="5 groups of a codebook of 4"):
        Grouped(5).choose(np.zeros((1, 4)), OrthogonalCodebook(4, 0, 0))


def test_an_atom_taken_with_both_signs_is_no_division_by_zero():
    """As two flipped bits of a robust file may have it."""
    assert not Signed(2).noise(np.array([[6, 7]]), OrthogonalCodebook(12, 0, 0)).any()
