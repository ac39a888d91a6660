import math
import tracemalloc

import numpy as np
import pytest

from quintic.codec.arithmetic import UNIT, exact_exp, step_coefficients
from quintic.codec.codebook import GaussianCodebook, OrthogonalCodebook
from quintic.core import ConfigError
from quintic.core.counter_rng import Stream
from quintic.diffusion import reverse_step


def every_atom(book):
    return book.combine(np.arange(book.size)[:, None], np.ones((book.size, 1)))


@pytest.mark.parametrize("d", [1, 2, 3, 12, 64, 100, 784])
@pytest.mark.parametrize("single", [False, True])
def test_orthogonal_atoms_are_at_right_angles_and_of_equal_length(d, single):
    atoms = every_atom(OrthogonalCodebook(d, seed=1, step=2, single=single)).astype(np.float64)
    np.testing.assert_allclose(atoms @ atoms.T, d * np.eye(d), atol=(1e-4 if single else 1e-6) * d)


@pytest.mark.parametrize(
    "book",
    [
        OrthogonalCodebook(52, 0, 3),
        OrthogonalCodebook(52, 0, 3, single=True),
        GaussianCodebook(52, 70, 0, 3),
        GaussianCodebook(52, 70, 0, None),
    ],
)
def test_inner_products_are_those_with_the_atoms(book):
    v = np.random.default_rng(0).normal(size=(4, 52))
    tolerance = 1e-3 if book.single else 1e-5
    np.testing.assert_allclose(book.inner(v), v @ every_atom(book).T, atol=tolerance)
    np.testing.assert_allclose(
        book.squared_norms(), np.square(every_atom(book)).sum(1), rtol=1e-4 if book.single else 1e-6
    )
    weights = np.array([[1.0, -1.0], [-1.0, 1.0]]) if book.single else np.array([[1.0, -2.0], [0.5, 1.0]])
    ids = np.array([[3, 9], [9, 51]])
    expected = np.einsum("nm,nmd->nd", weights, every_atom(book)[ids])
    np.testing.assert_allclose(book.combine(ids, weights), expected, atol=tolerance)


@pytest.mark.parametrize("d,m", [(784, 1), (784, 196), (1024, 300), (785, 3), (785, 40), (3072, 7), (3072, 768)])
def test_in_single_precision_no_sum_is_rounded(d, m):
    """The same with sums of doubles."""
    book, generator = OrthogonalCodebook(d, 3, 4, single=True), np.random.default_rng(0)
    ids, weights = generator.permutation(d)[None, :m], generator.choice([-1.0, 1.0], (1, m))
    blocks = [1 << bit for bit in reversed(range(d.bit_length())) if d >> bit & 1]
    hadamard, signed, first = np.zeros((d, d)), np.ones((2, d), dtype=np.float32), 0
    for block in blocks:
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.kron([[1, 1], [1, -1]], matrix)
        hadamard[first : first + block, first : first + block] = matrix
        signed[:, first : first + block] = math.sqrt(1 / block)
        first += block
    for i in range(2):
        words = Stream(3, "orthogonal codebook", 4).words(i * d, d)
        signed[i] *= np.where(words >> np.uint64(63), -1, 1)
    order = np.argsort(Stream(3, "orthogonal codebook", "order").words(0, d), kind="stable")
    steps = 2.0 ** (23 - math.ceil(math.ceil(math.log2(blocks[0] * m)) / 2))
    x, middle = np.zeros(d), np.zeros(d)
    x[ids[0]] = weights[0] * steps
    middle[order] = np.rint((hadamard @ x).astype(np.float32) * signed[1])
    sums = hadamard @ middle
    assert np.abs(sums).max() < 2**24
    expected = sums.astype(np.float32) * signed[0] * np.float32(math.sqrt(d) / steps)
    found = book.combine(ids, weights)
    assert found.dtype == np.float32 and (found[0] == expected).all()


@pytest.mark.parametrize("d", [12, 257, 784, 785, 3072])
def test_many_atoms_of_which_few_have_weight_give_the_same_bits_as_those_few(d):
    book, generator = OrthogonalCodebook(d, 3, 4), np.random.default_rng(0)
    ids, weights = generator.integers(0, d, (3, 50)), np.zeros((3, 50))  # some more than once
    weights[:, :10] = generator.normal(size=(3, 10))
    assert (book.combine(ids, weights) == book.combine(ids[:, :10], weights[:, :10])).all()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("d", [784, 1024])
def test_entries_of_orthogonal_atoms_are_close_to_normal(d, single):
    entries = every_atom(OrthogonalCodebook(d, 0, 0, single=single)).astype(np.float64).ravel()
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
