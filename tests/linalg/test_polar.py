"""msign against the SVD in float64, over shapes, ranks, scales, strides and dtypes."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from quintic.core import ConfigError
from quintic.linalg import choose_method, msign, polar
from quintic.linalg.coefficients import PRESETS, resolve_schedule
from quintic.linalg.polar import msign_

METHODS = ["newton-schulz", "gram", "svd"]


def polynomial_of(M, coefficients="quintic", steps=None):
    """The schedule applied to the singular values, by SVD in float64: what newton-schulz and gram should compute."""
    M = M.double()
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    norm = S.square().sum(-1, keepdim=True).sqrt()
    s = S / torch.where(norm > 0, norm, 1.0)
    for a, b, c in resolve_schedule(coefficients, steps):
        s = s * (a + s * s * (b + s * s * c))
    return (U * s.unsqueeze(-2)) @ Vh


def polar_of(M, tolerance=1e-12):
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U * (tolerance * S[..., :1] < S).double().unsqueeze(-2)) @ Vh


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_spectrum(n, m, singular, seed=0):
    U, _ = torch.linalg.qr(randn(n, n, seed=seed, dtype=torch.float64))
    V, _ = torch.linalg.qr(randn(m, m, seed=seed + 1, dtype=torch.float64))
    k = min(n, m)
    return (U[:, :k] * torch.as_tensor(singular, dtype=torch.float64)) @ V[:, :k].T


shapes = st.tuples(
    st.lists(st.integers(0, 3), max_size=2).map(tuple), st.integers(1, 24), st.integers(1, 24)
).map(lambda t: (*t[0], t[1], t[2]))  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 2**20),
    exponent=st.integers(-30, 30),
    method=st.sampled_from(["auto", "newton-schulz", "gram"]),
    name=st.sampled_from(PRESETS),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_computes_the_polynomial_of_the_singular_values(shape, seed, exponent, method, name, layout):
    M = randn(*shape, seed=seed)
    if layout == "transposed":
        M = M.mT.contiguous().mT
    elif layout == "strided":
        M = M.repeat_interleave(2, -1)[..., ::2]
    M = M * 10.0**exponent
    before = M.clone()
    out = msign(M, method=method, coefficients=name, dtype=torch.float32)
    assert torch.equal(M, before)
    assert out.shape == M.shape
    assert out.dtype == M.dtype
    expected = polynomial_of(M, name)
    if method == "auto" and min(shape[-2:]) == 1:
        expected = polar_of(M)  # vectors are normalised exactly
    assert (out - expected).abs().max() < 2e-4 if M.numel() else True


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    data=st.data(),
    exponent=st.integers(-30, 30),
    method=st.sampled_from(METHODS),
)
def test_exact_preset_and_svd_give_the_polar_factor_and_keep_the_null_space(n, m, data, exponent, method):
    rank = data.draw(st.integers(0, min(n, m)))
    singular = np.zeros(min(n, m))
    singular[:rank] = np.linspace(1.0, 0.05, rank)
    M = with_spectrum(n, m, singular, seed=data.draw(st.integers(0, 1000)))
    out = msign((M * 10.0**exponent).float(), method=method, coefficients="exact")
    expected = polar_of(M) if rank else torch.zeros(n, m)
    assert (out - expected).abs().max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_float64_stays_float64(method):
    M = randn(12, 30, dtype=torch.float64)
    out = msign(M, method=method, coefficients="exact")
    assert out.dtype == torch.float64
    assert (out - polar_of(M)).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-30, -20, -10, 0, 10, 19, 30, 38])
def test_scale_does_not_matter(method, exponent):
    M = with_spectrum(16, 32, np.geomspace(1, 1e-2, 16)).float()
    M = M / M.abs().max()
    torch.testing.assert_close(msign(M * 10.0**exponent, method=method), msign(M, method=method), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fast", [True, False])
def test_the_default_keeps_the_null_space_whether_bfloat16_is_fast_or_not(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    for n, m in ((96, 96), (64, 256), (256, 64)):
        k = min(n, m)
        M = with_spectrum(n, m, np.where(np.arange(k) < k // 3, 1.0, 0.0))
        U, _, Vh = torch.linalg.svd(M)
        out = U.T @ msign(M.float()).double() @ Vh.T
        out[: k // 3, : k // 3] = 0.0
        assert out.abs().max() < 1e-3


def test_bfloat16_products_fill_the_null_space():
    """Why they are not the default: if this fails, they could be."""
    M = with_spectrum(96, 96, np.where(np.arange(96) < 32, 1.0, 0.0))
    U, _, Vh = torch.linalg.svd(M)
    null = (U.T @ msign(M.float(), dtype=torch.bfloat16).double() @ Vh.T)[32:, 32:]
    assert torch.linalg.matrix_norm(null, 2) > 0.1


@pytest.mark.parametrize("exponent", [-100, -50, 0, 50, 100])
def test_bfloat16_products_do_not_depend_on_the_scale_and_keep_zero_and_neighbours(exponent):
    M = randn(4, 16, 32)
    M[1] = 0.0
    clean = msign(M, dtype=torch.bfloat16)
    M[2] *= 2.0**exponent  # about 1e-30 to 1e30
    M[3, 0, 0] = float("nan")
    out = msign(M, dtype=torch.bfloat16)
    assert torch.equal(out[:3], clean[:3])
    assert torch.equal(out[1], torch.zeros(16, 32))
    assert out[3].isnan().all()


@pytest.mark.parametrize("shape", [(5, 8), (0, 4, 4), (70, 48, 80), (3, 64, 700), (2, 3, 40, 30), (4, 1, 9)])
def test_in_place_equals_out_of_place(shape):
    M = randn(*shape)
    expected = msign(M)
    assert msign_(M) is M
    assert torch.equal(M, expected)


def test_denormal_input_has_a_direction_too():
    M = torch.eye(4) * 1e-42
    torch.testing.assert_close(msign(M, coefficients="exact"), torch.eye(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_is_exactly_zero_and_does_not_touch_its_neighbours(method):
    M = randn(5, 8, 16)
    M[2] = 0.0
    out = msign(M, method=method)
    assert torch.equal(out[2], torch.zeros(8, 16))
    without = msign(M[[0, 1, 3, 4]], method=method)
    torch.testing.assert_close(out[[0, 1, 3, 4]], without, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-42, -30, 25, 38])
def test_an_extreme_matrix_does_not_touch_a_bit_of_its_neighbours(method, exponent):
    M = randn(5, 8, 16).clamp(-3, 3)
    usual = msign(M, method=method)
    M[2] *= 10.0**exponent
    out = msign(M, method=method)
    assert torch.equal(out[[0, 1, 3, 4]], usual[[0, 1, 3, 4]])


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 9), (1, 5), (5, 1)])
def test_a_non_finite_element_spoils_its_own_matrix_only(method, bad, shape):
    M = randn(3, *shape)
    clean = msign(M, method=method)
    M[1, shape[0] // 2, shape[1] // 2] = bad
    out = msign(M, method=method)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_axes(method, shape):
    out = msign(torch.empty(shape), method=method)
    assert out.shape == shape


def test_special_cases_of_the_post():
    assert msign(torch.tensor([[-3.0]])).item() == -1.0  # 1 x 1: the sign
    column = randn(7, 1)
    torch.testing.assert_close(msign(column), column / column.norm())  # n x 1: normalisation
    torch.testing.assert_close(msign(column.mT), column.mT / column.norm())
    diagonal = torch.diag(torch.tensor([5.0, -0.2, 1.0]))
    torch.testing.assert_close(msign(diagonal, coefficients="exact"), diagonal.sign())  # diagonal: elementwise sign
    square = randn(6, 6, dtype=torch.float64)
    nearest = msign(square, coefficients="exact")
    for seed in range(20):  # the nearest orthogonal matrix
        other, _ = torch.linalg.qr(square + 0.3 * randn(6, 6, seed=seed + 1, dtype=torch.float64))
        assert (square - nearest).norm() <= (square - other).norm() + 1e-12


@pytest.mark.parametrize("method", ["newton-schulz", "gram"])
def test_equivariance(method):
    M = randn(9, 14, dtype=torch.float64)
    P, _ = torch.linalg.qr(randn(9, 9, seed=1, dtype=torch.float64))
    Q, _ = torch.linalg.qr(randn(14, 14, seed=2, dtype=torch.float64))
    out = msign(M, method=method)
    torch.testing.assert_close(msign(P @ M @ Q, method=method), P @ out @ Q)
    torch.testing.assert_close(msign(M.mT, method=method), out.mT)
    torch.testing.assert_close(msign(-M, method=method), -out)


@pytest.mark.parametrize("shape", [(7, 32, 32), (200, 16, 48), (3, 64, 1500)])
@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_loop(shape, method):
    """Also across the parts that a large batch is worked on in."""
    M = randn(*shape)
    looped = torch.stack([msign(x, method=method) for x in M])
    torch.testing.assert_close(msign(M, method=method), looped, atol=2e-5, rtol=0)


@pytest.mark.parametrize("spectrum", ["linear", "1e-3", "1e-6", "1e-10", "rank 10", "rank 1"])
@pytest.mark.parametrize("name", ["keller", "quintic", "polar-express", "exact"])
@pytest.mark.parametrize("method", ["newton-schulz", "gram"])
def test_float32_is_accurate_for_any_spectrum(spectrum, name, method):
    k = 64
    singular = {
        "linear": np.linspace(1, 0.01, k),
        "1e-3": np.geomspace(1, 1e-3, k),
        "1e-6": np.geomspace(1, 1e-6, k),
        "1e-10": np.geomspace(1, 1e-10, k),
        "rank 10": np.arange(k) < 10,
        "rank 1": np.arange(k) < 1,
    }[spectrum]
    M = with_spectrum(k, 256, singular)
    out = msign(M.float(), method=method, coefficients=name, dtype=torch.float32)
    expected = msign(M, method="newton-schulz", coefficients=name)  # float64, whose null space is clean
    assert (out - expected).abs().max() < 3e-4


def test_default_accuracy_bar():
    """Singular values in [1e-2, 1] of the norm: within 0.15 for the default five steps, 1e-5 for exact."""
    singular = np.concatenate([[0.8], np.geomspace(0.59, 0.0101, 20)])
    singular[1:] *= np.sqrt(1 - 0.8**2) / np.linalg.norm(singular[1:])
    singular = np.maximum(singular, 0.0101)
    M = with_spectrum(21, 21, singular / np.linalg.norm(singular)).float()
    for name, bar in (("quintic", 0.035), ("polar-express", 0.15), ("exact", 1e-5)):
        S = torch.linalg.svdvals(msign(M, coefficients=name, dtype=torch.float32).double())
        assert (S - 1).abs().max() < bar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_worked_on_in_float32_by_choice(dtype):
    M = randn(24, 24).to(dtype)
    out = msign(M, coefficients="exact", dtype=torch.float32)
    assert out.dtype == dtype
    assert (out.double() - polar_of(M)).abs().max() < 2 * torch.finfo(dtype).eps


def test_bfloat16_products_are_available_and_coarse():
    M = with_spectrum(24, 24, np.linspace(1, 0.3, 24)).float()
    error = (msign(M, dtype=torch.bfloat16) - polynomial_of(M)).abs().max()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (96, 256), (256, 96)])
def test_half_precision_rounds_the_iterates_and_nothing_larger(shape):
    """With a on the diagonal of the polynomial, which is rounded too, the error is 0.011."""
    M = randn(*shape)
    exact = polynomial_of(M)
    error = msign(M, method="newton-schulz", dtype=torch.bfloat16) - exact
    assert torch.linalg.norm(error) < 0.0085 * torch.linalg.norm(exact)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_what_half_precision_cannot_do_is_done_in_float32_where_bfloat16_is_fast(monkeypatch, method):
    M = randn(6, 24)
    expected = msign(M, method=method)
    monkeypatch.setattr(polar, "fast_dtype", lambda _: torch.bfloat16)
    assert torch.equal(msign(M, method=method), expected)


@pytest.mark.parametrize("shape", [(9, 9), (7, 6, 20), (5, 20, 6)])
def test_matrices_larger_than_the_cache_go_one_by_one(monkeypatch, shape):
    M = randn(*shape)
    expected = msign(M)
    monkeypatch.setattr(polar, "_CACHED_BYTES", 1)
    torch.testing.assert_close(msign(M), expected, atol=1e-6, rtol=0)


def test_gram_is_refused_in_half_precision():
    with pytest.raises(ConfigError, match="newton-schulz"):
        msign(randn(4, 16), method="gram", dtype=torch.bfloat16)


def test_choice_of_method():
    assert choose_method(64, 64, torch.float32) == "newton-schulz"
    assert choose_method(64, 127, torch.float32) == "newton-schulz"
    assert choose_method(64, 128, torch.float32) == "gram"
    assert choose_method(128, 64, torch.float64) == "gram"
    assert choose_method(512, 64, torch.bfloat16) == "newton-schulz"
    assert choose_method(512, 64, torch.float16) == "newton-schulz"
    assert choose_method(1, 64, torch.float32) == "svd"


@pytest.mark.parametrize("method", ["newton-schulz", "gram", "svd"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (2, 3, 8), (1, 4)])
def test_differentiable(method, shape):
    M = randn(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: msign(x, method=method), (M,))
    assert torch.autograd.gradgradcheck(lambda x: msign(x, method=method), (M,))


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (2, 3, 8)])
def test_svd_is_differentiable_where_singular_values_are_equal(shape):
    M = msign(randn(*shape, dtype=torch.float64), method="svd").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: msign(x, method="svd"), (M,))


def test_svd_has_a_whole_jacobian_at_once():
    M = randn(3, 5, dtype=torch.float64)
    sign = lambda x: msign(x, method="svd")  # noqa: E731
    torch.testing.assert_close(torch.func.jacrev(sign)(M), torch.autograd.functional.jacobian(sign, M))


def test_svd_has_the_derivative_at_constant_rank():
    a, b = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 2), (2, 6)))
    assert torch.autograd.gradcheck(lambda a, b: msign(a @ b, method="svd"), (a, b))
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(msign(zero, method="svd").sum(), zero)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_tracking_does_not_change_the_result(dtype):
    M = randn(5, 30, dtype=dtype)
    out = msign(M.clone().requires_grad_())
    assert out.dtype == dtype and torch.equal(out.detach(), msign(M))


def test_autocast_does_not_reach_the_products():
    M = randn(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = msign(M), msign(M.clone().requires_grad_()).detach()
    assert torch.equal(inside[0], msign(M))
    assert torch.equal(inside[1], msign(M))


@pytest.mark.parametrize(
    ("M", "arguments", "message"),
    [
        (torch.zeros(3), {}, "matrices"),
        (torch.zeros(3, 3, dtype=torch.int64), {}, "floating"),
        (torch.zeros(3, 3, dtype=torch.complex64), {}, "real"),
        (torch.zeros(3, 3), {"method": "newton"}, "did you mean 'newton-schulz'"),
        (torch.zeros(3, 3), {"coefficients": "kellar"}, "did you mean 'keller'"),
        (torch.zeros(3, 3), {"dtype": torch.int32}, "real floating dtype"),
        (torch.zeros(3, 3), {"dtype": "bfloat16"}, r"dtype = 'bfloat16'; expected .* torch\.bfloat16"),
        (np.zeros((3, 3)), {}, "found ndarray"),
    ],
)
def test_wrong_arguments(M, arguments, message):
    with pytest.raises(ConfigError, match=message):
        msign(M, **arguments)
