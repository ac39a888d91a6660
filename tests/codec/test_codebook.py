import tracemalloc

import numpy as np
import pytest

from quintic.codec.arithmetic import UNIT, exact_exp, step_coefficients
from quintic.codec.codebook import GaussianCodebook, OrthogonalCodebook
from quintic.core import ConfigError
from quintic.diffusion import reverse_step


def every_atom(book):
    return book.combine(np.arange(book.size)[:, None], np.ones((book.size, 1)))


@pytest.mark.parametrize("d", [1, 2, 3, 12, 64, 100, 784])
def test_orthogonal_atoms_are_at_right_angles_and_of_equal_length(d):
    atoms = every_atom(OrthogonalCodebook(d, seed=1, step=2))
    np.testing.assert_allclose(atoms @ atoms.T, d * np.eye(d), atol=1e-6 * d)


@pytest.mark.parametrize(
    "book", [OrthogonalCodebook(52, 0, 3), GaussianCodebook(52, 70, 0, 3), GaussianCodebook(52, 70, 0, None)]
)
def test_inner_products_are_those_with_the_atoms(book):
    v = np.random.default_rng(0).normal(size=(4, 52))
    np.testing.assert_allclose(book.inner(v), v @ every_atom(book).T, atol=1e-5)
    np.testing.assert_allclose(book.squared_norms(), np.square(every_atom(book)).sum(1), rtol=1e-6)
    ids, weights = np.array([[3, 9], [9, 51]]), np.array([[1.0, -2.0], [0.5, 1.0]])
    expected = np.einsum("nm,nmd->nd", weights, every_atom(book)[ids])
    np.testing.assert_allclose(book.combine(ids, weights), expected, atol=1e-5)


@pytest.mark.parametrize("d", [784, 1024])
def test_entries_of_orthogonal_atoms_are_close_to_normal(d):
    entries = every_atom(OrthogonalCodebook(d, 0, 0)).ravel()
    assert abs(entries.mean()) < 0.01
    assert abs((entries**4).mean() - 3.0) < 0.1  # plain signs have 1


def test_steps_and_seeds_have_books_of_their_own_and_shared_books_do_not():
    def atom(book):
        return book.combine(np.array([[5]]), np.ones((1, 1)))

    made = [atom(GaussianCodebook(20, 8, seed, step)) for seed, step in [(0, 0), (0, 1), (1, 0), (0, None)]]
    made += [atom(OrthogonalCodebook(20, seed, step)) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    assert len({m.tobytes() for m in made}) == len(made)


def test_known_atoms():
    """What is written here can never change: files depend on it."""
    atom = GaussianCodebook(3, 4, 7, 1).combine(np.array([[2]]), np.ones((1, 1)))
    assert [x.hex() for x in atom[0].tolist()] == [
        "-0x1.9e22d1f156b29p-1", "0x1.719b4f8878359p+0", "-0x1.a2fa83c9062f8p-3"
    ]  # fmt: skip
    atom = OrthogonalCodebook(6, 7, 1).combine(np.array([[2]]), np.ones((1, 1)))
    assert np.rint(atom[0] * 2**20).tolist() == [-642119, -908093, 908093, -642119, -1926357, 642119]


def test_an_orthogonal_book_takes_memory_in_proportion_to_its_dimension():
    d = 1 << 14
    tracemalloc.start()
    book = OrthogonalCodebook(d, 0, 0)
    book.inner(np.ones((1, d)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 8 * d  # all atoms together would be 16384 * 8 * d


@pytest.mark.parametrize("make", [lambda: GaussianCodebook(4, 1, 0, 0), lambda: OrthogonalCodebook(0, 0, 0)])
def test_impossible_books_are_refused(make):
    with pytest.raises(ConfigError, match="codebook"):
        make()


def test_exponentials_and_steps_agree_with_the_library():
    x = np.linspace(-30, 30, 1001)
    np.testing.assert_allclose([exact_exp(float(v)) for v in x], np.exp(x), rtol=5e-16)
    for level, following in [(-2560, -2000), (-10, 3), (500, 2560)]:
        expected = reverse_step(level / UNIT, following / UNIT)
        np.testing.assert_allclose(step_coefficients(level, following), expected, rtol=1e-12)
