"""One contract for all rules, and each rule against its definition written down directly."""

import functools

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from tests.lowrank.matrices import (
    ByProducts,
    best,
    column_error,
    duplicates,
    hilbert,
    kahan,
    outliers,
    randn,
    snn,
    with_spectrum,
)

from quintic.core import ConfigError
from quintic.lowrank import RULES, cur, select_columns, select_rows
from quintic.lowrank.pivots import cross_pivots, greedy_error, lu_pivots
from quintic.lowrank.scores import leverage, leverage_ridge, leverage_sampled, leverage_top, subsampled

rules = pytest.mark.parametrize("method", RULES)
DRAWN = {"quality", "fast", "norms-sampled", "leverage-sampled", "k-means", "uniform", "subsampled", "greedy-error"}


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 14, 4), (14, 9, 9), (1, 6, 1), (6, 1, 1), (90, 110, 3)])
def test_contract(method, dtype, m, n, k):
    A = randn(2, 3, m, n, dtype=dtype)
    kept = A.clone()
    at = select_columns(A, k, method=method, seed=5)
    assert at.shape == (2, 3, k) and at.dtype == torch.int64
    assert all(len(set(each)) == k for each in at.reshape(-1, k).tolist())
    assert at.min() >= 0 and at.max() < n
    assert torch.equal(at, select_columns(A, k, method=method, seed=5)), "the same seed, the same columns"
    if m > 1:  # columns of a single row are all equally good
        alone = select_columns(A[1, 2], k, method=method, seed=5)
        assert set(at[1, 2].tolist()) == set(alone.tolist()), "a batch changes nothing"
    assert torch.equal(A, kept), "the matrix is left alone"


@rules
@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_the_scale_does_not_matter(method, scale):
    A = with_spectrum(30, 40, 0.7 ** np.arange(30))
    assert torch.equal(select_columns(A, 5, method=method), select_columns(A * scale, 5, method=method))


@rules
@pytest.mark.parametrize("A", [torch.zeros(6, 8), torch.ones(6, 8), duplicates(6, 2, 4)], ids=["zero", "ones", "twins"])
def test_nothing_to_choose_from_still_gives_different_columns(method, A):
    assert len(set(select_columns(A, 6, method=method).tolist())) == 6


@rules
def test_rows_are_columns_of_the_conjugate_transpose(method):
    A = randn(12, 30, dtype=torch.complex128)
    assert torch.equal(select_rows(A, 4, method=method), select_columns(A.mH, 4, method=method))


@rules
def test_a_few_columns_that_hold_everything_are_found_by_rules_that_look(method):
    A = torch.zeros(40, 60, dtype=torch.float64)
    A[:, [7, 21, 50]] = randn(40, 3)
    found = set(select_columns(A, 3, method=method).tolist()) == {7, 21, 50}
    assert found == (method not in ("uniform", "subsampled", "k-means"))  # zero is a cluster of its own


@rules
@pytest.mark.parametrize("k", [0, 7, -1])
def test_an_impossible_number_of_columns(method, k):
    with pytest.raises(ConfigError, match=r"expected 1 to 6"):
        select_columns(randn(6, 8), k, method=method)


@pytest.mark.parametrize("method", sorted(DRAWN - {"quality", "greedy-error"}))
def test_another_seed_draws_something_else(method):
    A = with_spectrum(150, 200, 0.99 ** np.arange(150))
    seen = {tuple(select_columns(A, 5, method=method, seed=s).tolist()) for s in range(4)}
    assert len(seen) > 1


def test_an_unknown_rule_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'pivoted-qr'"):
        select_columns(randn(3, 3), 1, method="pivotedqr")


def test_a_function_is_a_rule():
    A = randn(20, 30)
    expected = leverage(A, 2).topk(4).indices
    assert torch.equal(select_columns(A, 4, method=functools.partial(leverage_top, gamma=2)), expected)


@pytest.mark.parametrize("given", [[4, 0, 2], np.array([4, 0, 2]), torch.tensor([4, 0, 2], dtype=torch.int32)])
def test_a_rule_of_ones_own_may_give_positions_of_any_kind(given):
    A = randn(6, 5)
    found = cur(A, rank=3, method=lambda A, k, *, seed: given)
    assert found.cols.tolist() == found.rows.tolist() == [4, 0, 2]
    torch.testing.assert_close(found.C, A[:, [4, 0, 2]])


@pytest.mark.parametrize(
    "given", [[0, 0, 1], [0, 1], [0, 1, 5], [-1, 0, 1], [0.0, 1.0, 2.0], [True, False, True], 3, None, [[0, 1, 2]]]
)
def test_a_rule_of_ones_own_that_chooses_no_columns(given):
    def mine(A, k, *, seed):
        return given

    with pytest.raises(ConfigError, match=r"the rule mine chose .*; expected 3 different positions from 0 to 4"):
        select_columns(randn(6, 5), 3, method=mine)


@pytest.mark.parametrize(
    "A", [randn(30, 50), randn(50, 30), randn(30, 50, dtype=torch.complex128), kahan(40), kahan(40, shift=25)]
)
def test_pivoted_qr_is_that_of_lapack(A):
    expected = scipy.linalg.qr(A.numpy(), pivoting=True)[2][:12]
    found = select_columns(A, 12, method="pivoted-qr").tolist()
    errors = [column_error(A, at) for at in (found, expected)]
    assert found == expected.tolist() or errors[0] <= errors[1] * 1.001  # without the shift Kahan's columns tie


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_deim_is_its_recursion(dtype):
    A = with_spectrum(40, 60, 0.8 ** np.arange(40), dtype=dtype)
    V = np.linalg.svd(A.numpy())[2][:8].conj().T
    chosen = []
    for t in range(8):
        left = V[:, t] - V[:, :t] @ np.linalg.solve(V[chosen, :t], V[chosen, t]) if t else V[:, 0]
        chosen.append(int((abs(left.real) + abs(left.imag)).argmax()))
    assert select_columns(A, 8, method="deim").tolist() == chosen


def test_lu_pivots_are_those_of_lapack():
    T = randn(30, 6)
    P = scipy.linalg.lu(T.numpy())[0]
    assert lu_pivots(T).tolist() == P.argmax(0)[:6].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20)])
def test_greedy_error_takes_the_best_next_column_each_time(m, n, dtype):
    A = with_spectrum(m, n, 0.8 ** np.arange(20), dtype=dtype)
    chosen = []
    for _ in range(6):
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(min(rest, key=lambda j: column_error(A, [*chosen, j])))
    assert greedy_error(A, 6).tolist() == chosen


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_residual_aware_rule_is_its_definition(dtype):
    A = with_spectrum(20, 30, 0.8 ** np.arange(20), dtype=dtype).numpy()
    V = np.linalg.svd(A)[2][:6]
    E = A - A @ V.conj().T @ V
    chosen = []
    for _ in range(6):
        score = (abs(E) ** 2).sum(0) / np.maximum((abs(V) ** 2).sum(0), 1e-12)
        score[chosen] = np.inf
        j = int(score.argmin())
        share = V[:, j].conj() @ V / np.linalg.norm(V[:, j]) ** 2
        E, V = E - np.outer(E[:, j], share), V - np.outer(V[:, j], share)
        chosen.append(j)
    assert select_columns(A, 6).tolist() == chosen


def test_greedy_det_takes_the_largest_determinant_each_time():
    A = randn(9, 11)
    rows, columns = [], []
    for _ in range(5):
        pairs = [(i, j) for i in range(9) if i not in rows for j in range(11) if j not in columns]
        i, j = max(pairs, key=lambda p: abs(np.linalg.det(A.numpy()[np.ix_([*rows, p[0]], [*columns, p[1]])])))
        rows.append(i)
        columns.append(j)
    found = cross_pivots(A, 5)
    assert found[0].tolist() == rows and found[1].tolist() == columns


def test_leverage_is_the_diagonal_of_the_projection_and_sums_to_gamma():
    A = randn(30, 20)
    V = np.linalg.svd(A.numpy())[2][:7].T
    np.testing.assert_allclose(leverage(A, 7), np.diag(V @ V.T))
    assert leverage(A, 7).sum().item() == pytest.approx(7)


@pytest.mark.parametrize("ridge", [0.3, 50.0])
def test_ridge_leverage_is_its_definition(ridge):
    A = randn(15, 25) * torch.logspace(0, 1, 25, dtype=torch.float64)
    scores = np.diag(A.numpy().T @ np.linalg.inv(A.numpy() @ A.numpy().T + ridge * np.eye(15)) @ A.numpy())
    assert leverage_ridge(A, 6, ridge=ridge).tolist() == np.argsort(-scores)[:6].tolist()
    with pytest.raises(ConfigError, match="positive"):
        leverage_ridge(A, 6, ridge=-1.0)
    large = A.float() * 2.0**90  # computed at scale 1, and the ridge with it
    assert leverage_ridge(large, 6, ridge=ridge * 2.0**180).tolist() == np.argsort(-scores)[:6].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ridge_far_above_the_matrix_leaves_the_longest_columns(dtype):
    A = randn(15, 25, dtype=dtype)
    for ridge in (1e30, 1e50, 1e300, float("inf")):
        assert torch.equal(leverage_ridge(A, 6, ridge=ridge), RULES["norms-top"](A, 6))
    assert torch.equal(leverage_ridge(A, 6, ridge=1e-300), leverage_ridge(A, 6, ridge=1e-12))


def shared_and_alone(scale):
    """Fifty long columns in one direction, and two short ones alone in theirs: a small ridge takes 5 and 40."""
    A = torch.zeros(30, 52, dtype=torch.float64)
    A[0] = 10.0
    A[:, [5, 40]] = 0.0
    A[[1, 2], [5, 40]] = 2.0
    return A * scale


@pytest.mark.parametrize("scale", [1.0, 2.0**500, 2.0**-500])
@pytest.mark.parametrize("given", [lambda A: A, lambda A: scipy.sparse.csr_matrix(A.numpy()), ByProducts])
def test_a_ridge_is_of_the_matrix_as_it_was_given(given, scale):
    # Scores are 4 / (4 + ridge) alone and 100 / (5000 + ridge) shared: equal at a ridge of 204.
    for ridge, alone in ((20.0, True), (1000.0, False)):
        rule = functools.partial(leverage_ridge, ridge=ridge * scale**2)
        found = select_columns(given(shared_and_alone(scale)), 2, method=rule)
        assert (set(found.tolist()) == {5, 40}) == alone


def test_the_ridge_is_a_kth_of_what_the_best_matrix_leaves():
    k, told = 4, set()
    for seed in range(6):
        A = with_spectrum(20, 30, 1 / np.arange(1, 21), seed=seed)
        S, Vh = np.linalg.svd(A.numpy(), full_matrices=False)[1:]
        chosen = {}
        for share in (k, 1, k * k):
            ridge = (S[k:] ** 2).sum() / share
            chosen[share] = np.argsort(-((S**2 / (S**2 + ridge))[:, None] * Vh**2).sum(0))[:k].tolist()
        assert leverage_ridge(A, k).tolist() == chosen[k]
        told |= {share for share, at in chosen.items() if at != chosen[k]}
    assert told == {1, k * k}, "other ridges would choose others"


def test_k_means_takes_the_columns_nearest_to_centres_that_have_settled():
    """Lloyd's algorithm written down, from the same start, until nothing moves."""
    P = np.sort(torch.rand(300, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy(), axis=0)
    u = torch.rand(5, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    centres = [P[int(u[0] * len(P))]]
    for t in range(1, 5):
        reach = np.min([(P - c) ** 2 for c in centres], axis=0)[:, 0].cumsum()
        centres.append(P[np.searchsorted(reach, u[t] * reach[-1])])
    path = [np.array(centres)]
    while len(path) < 2 or not np.array_equal(path[-1], path[-2]):
        owner = np.abs(P - path[-1].T).argmin(1)
        path.append(np.array([P[owner == i].mean(0) for i in range(5)]))
    assert 20 < len(path) < 25
    chosen = select_columns(torch.from_numpy(P.T.copy()).repeat(5, 1), 5, method="k-means", seed=5)
    assert chosen.tolist() == np.abs(P - path[-1].T).argmin(0).tolist()


def test_k_means_takes_one_column_of_each_cluster():
    centres = 10 * torch.eye(20, 6, dtype=torch.float64)
    owner = torch.arange(6).repeat_interleave(15)
    A = centres[:, owner] + 0.1 * randn(20, 90)
    assert sorted(owner[select_columns(A, 6, method="k-means")].tolist()) == list(range(6))


def test_norms_are_sampled_by_their_squares():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    counts = np.bincount(
        [select_columns(A, 1, method="norms-sampled", seed=s).item() for s in range(2000)], minlength=3
    )
    np.testing.assert_allclose(counts / 2000, np.array([1, 4, 9]) / 14, atol=0.04)


def test_subsampled_takes_any_rule_and_a_sample_of_any_size():
    A = randn(30, 200)
    assert torch.equal(
        subsampled(A, 5, size=200, rule=RULES["pivoted-qr"]).sort().values, RULES["pivoted-qr"](A, 5).sort().values
    )
    with pytest.raises(ConfigError, match="expected 5 to 200"):
        subsampled(A, 5, size=3)


@pytest.mark.parametrize(
    ("A", "k", "bar"),
    [
        (hilbert(300), 8, 1.15),
        (kahan(300), 50, 1.15),
        (outliers(), 20, 1.05),
        (snn(), 30, 1.12),
    ],
    ids=["hilbert", "kahan", "outliers", "snn"],
)
def test_quality_is_near_the_best_where_pivoting_is_not(A, k, bar):
    error = column_error(A, select_columns(A, k))
    assert error <= bar * best(A, k)
    assert error <= column_error(A, select_columns(A, k, method="pivoted-qr"))


def test_quality_is_not_worse_than_pivoting_on_random_vectors():
    A = with_spectrum(300, 260, 1 / np.arange(1, 261))
    assert column_error(A, select_columns(A, 30)) <= 1.05 * column_error(A, select_columns(A, 30, method="pivoted-qr"))


def test_quality_keeps_the_bound_of_osinsky():
    for seed in range(20):
        A = with_spectrum(20, 25, 0.5 ** np.arange(20), seed=seed)
        assert column_error(A, select_columns(A, 4)) <= 5**0.5 * best(A, 4)


@pytest.mark.parametrize("method", RULES)
def test_a_rule_by_itself_takes_any_scale(method):
    A = randn(12, 10)
    assert torch.equal(RULES[method](A, 4, seed=1), RULES[method](A * 2.0**900, 4, seed=1))


def test_sampled_leverages_are_of_the_directions_asked_for():
    """The first direction has two columns, the others eight."""
    A = torch.zeros(9, 10, dtype=torch.float64)
    A[0, [3, 7]] = 10.0
    A[1:, [0, 1, 2, 4, 5, 6, 8, 9]] = torch.eye(8, dtype=torch.float64)
    for seed in range(5):
        assert set(leverage_sampled(A, 2, seed=seed, gamma=1).tolist()) == {3, 7}
    assert any(set(leverage_sampled(A, 2, seed=seed, gamma=9).tolist()) != {3, 7} for seed in range(5))


def test_a_matrix_of_the_rank_asked_for_leaves_no_ridge():
    A = torch.zeros(5, 6, dtype=torch.float64)
    A[[0, 1, 2], [4, 1, 5]] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert set(leverage_ridge(A, 3).tolist()) == {1, 4, 5}
