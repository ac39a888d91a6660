"""Attention through landmarks: exact attention, the pseudo-inverse's residual, batch mates, padding, precision."""

import pytest
import torch
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.lowrank import NystromAttention, nystrom_attention
from quintic.lowrank.attention import _inverse, _segment_means


def tokens(batch=2, heads=3, n=200, d=16, seed=0, smooth=0.97, dtype=torch.float64):
    """Queries, keys and values that change slowly along the sequence."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(3, batch, heads, n, d, generator=g, dtype=torch.float64)
    x = [steps[..., 0, :]]
    for i in range(1, n):
        x.append(smooth * x[-1] + (1 - smooth**2) ** 0.5 * steps[..., i, :])
    return torch.stack(x, dim=-2).to(dtype)


def error(near, exact):
    return float((near - exact).norm() / exact.norm())


def test_by_the_formula():
    """Each factor written out."""
    q, k, v = tokens(1, 1, 60, 8)
    means = [x.view(1, 1, 6, 10, 8).mean(3) for x in (q, k)]
    first = torch.softmax(q @ means[1].mT / 8**0.5, -1)
    middle = torch.softmax(means[0] @ means[1].mT / 8**0.5, -1)
    last = torch.softmax(means[0] @ k.mT / 8**0.5, -1)
    expected = first @ torch.linalg.pinv(middle, rtol=1e-6) @ last @ v
    assert torch.allclose(nystrom_attention(q, k, v, 6, ridge=0.0), expected, atol=1e-9)
    U, S, Vh = torch.linalg.svd(middle)
    level = 0.1 * (middle.sum(-1).amax(-1) * middle.sum(-2).amax(-1)).sqrt()[..., None]
    damped = Vh.mT @ torch.diag_embed(S / (S**2 + level**2)) @ U.mT
    assert torch.allclose(nystrom_attention(q, k, v, 6, ridge=0.1), first @ damped @ last @ v, atol=1e-9)


def test_more_landmarks_are_nearer_and_enough_are_exact():
    q, k, v = tokens()
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = [error(nystrom_attention(q, k, v, m), exact) for m in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert torch.equal(nystrom_attention(q, k, v, 200), exact) and torch.equal(nystrom_attention(q, k, v, 999), exact)


def test_constant_values_come_through():
    """Rows of attention sum to one; so do those of the approximation."""
    q, k, _ = tokens(dtype=torch.float32)
    ones = torch.ones(2, 3, 200, 5)
    assert torch.allclose(nystrom_attention(q, k, ones, 24), ones, atol=0.05)
    assert torch.allclose(nystrom_attention(q, k, ones, 24, ridge=0.0), ones, atol=1e-4)


def test_on_slow_sequences_a_ridge_is_nearer_than_the_true_pseudo_inverse_and_than_six_steps():
    """Six steps of the usual iteration are a regularisation too; on rough sequences either may be the nearer one."""
    q, k, v = tokens(1, 4, 256, 32)
    exact = F.scaled_dot_product_attention(q, k, v)
    with_ridge, without = (error(nystrom_attention(q, k, v, 64, ridge=ridge), exact) for ridge in (0.01, 0.0))
    means = [_segment_means(x, 64, None) for x in (q * 32**-0.5, k)]
    A = torch.softmax(means[0] @ means[1].mT, -1)
    Z = A.mT / (A.sum(-1).max() * A.sum(-2).max())
    eye = torch.eye(64, dtype=torch.float64)
    for _ in range(6):
        AZ = A @ Z
        Z = Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ))) / 4
    six = torch.softmax(q * 32**-0.5 @ means[1].mT, -1) @ Z @ (torch.softmax(means[0] @ k.mT, -1) @ v)
    assert with_ridge < error(six, exact) and with_ridge < without


@pytest.mark.parametrize("m", [8, 32, 64])
@pytest.mark.parametrize("smooth", [0.0, 0.9, 0.999])
def test_residual_of_the_pseudo_inverse(m, smooth):
    q, k, _ = tokens(3, 2, 256, 16, smooth=smooth, dtype=torch.float32)
    A = torch.softmax(_segment_means(q, m, None) @ _segment_means(k, m, None).mT / 4, -1).double()
    Z = _inverse(A, 0.0)
    residual = (A @ Z @ A - A).flatten(2).norm(dim=-1) / A.flatten(2).norm(dim=-1)
    assert float(residual.max()) <= 1e-5


def test_an_answer_does_not_depend_on_the_batch_mates():
    """Also where a mate's attention has collapsed, or is a hundred times larger."""
    q, k, v = tokens(8, 2, 128, 16, dtype=torch.float32)
    q[3], k[3] = 0.0, 0.0
    q[5] *= 100.0
    together = nystrom_attention(q, k, v, 32)
    for i in range(8):
        alone = nystrom_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 32)[0]
        assert torch.allclose(alone, together[i], atol=1e-5)


@pytest.mark.parametrize("lengths", [(120, 77), (40, 9), (33, 1)])
def test_padding_counts_for_nothing(lengths):
    """As the sequences by themselves, also with fewer tokens than landmarks."""
    q, k, v = tokens(2, 3, 120, 8)
    mask = torch.zeros(2, 120, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(120, generator=torch.Generator().manual_seed(row))[:length]] = True
    found = nystrom_attention(q, k, v, 32, mask=mask[:, None])
    assert found.isfinite().all()
    for row, length in enumerate(lengths):
        a, b, c = (x[row][:, mask[row]] for x in (q, k, v))
        alone = nystrom_attention(a, b, c, 32) if length > 32 else F.scaled_dot_product_attention(a, b, c)
        assert torch.allclose(found[row][:, mask[row]], alone, atol=1e-6 if length > 32 else 2e-2)


def test_segments_are_of_nearly_equal_length():
    x = torch.arange(10.0)[None, :, None]
    assert _segment_means(x, 3, None).flatten().tolist() == [1.0, 4.0, 7.5]
    assert _segment_means(x, 5, None).flatten().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_low_precision_in_low_precision_out():
    q, k, v = tokens(1, 2, 150, 16)
    exact = nystrom_attention(q, k, v, 32)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        found = nystrom_attention(q.to(dtype), k.to(dtype), v.to(dtype), 32)
        assert found.dtype == dtype and error(found.double(), exact) < limit


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in tokens(1, 1, 14, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: nystrom_attention(q, k, v, 3), (q, k, v), atol=1e-6)


def test_the_module_with_landmarks_for_all_is_ordinary_attention():
    torch.manual_seed(0)
    module = NystromAttention(24, 4, landmarks=50, bias=True)
    x = torch.randn(2, 50, 24)
    plain = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(module.qkv.weight)
        plain.in_proj_bias.copy_(module.qkv.bias)
        plain.out_proj.weight.copy_(module.out.weight)
        plain.out_proj.bias.copy_(module.out.bias)
    assert torch.allclose(module(x), plain(x, x, x, need_weights=False)[0], atol=1e-5)
    mask = torch.arange(50) < torch.tensor([[50], [30]])
    expected = plain(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
    assert torch.allclose(module(x, mask)[mask], expected[mask], atol=1e-5)


def test_what_is_refused():
    q, k, v = tokens(1, 1, 20, 4)
    with pytest.raises(ConfigError, match="no causal form"):
        nystrom_attention(q, k, v, 4, causal=True)
    for ridge in (-0.1, 1e-9, 2.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="ridge"):
            nystrom_attention(q, k, v, 4, ridge=ridge)
    for landmarks in (0, 3.0):
        with pytest.raises(ConfigError, match=f"landmarks = {landmarks}; expected 1 or more"):
            nystrom_attention(q, k, v, landmarks)
        with pytest.raises(ConfigError, match=f"landmarks = {landmarks}; expected 1 or more"):
            NystromAttention(8, 2, landmarks)
    with pytest.raises(ConfigError, match=r"queries \(..., n, d\), found \(4,\)"):
        nystrom_attention(q[0, 0, 0], k, v, 4)
    with pytest.raises(ConfigError, match="keys like the queries"):
        nystrom_attention(q, k[..., :10, :], v, 4)
    with pytest.raises(ConfigError, match="of bool"):
        nystrom_attention(q, k, v, 4, mask=torch.ones(20))
    with pytest.raises(ConfigError, match="without tokens"):
        nystrom_attention(q, k, v, 4, mask=torch.zeros(20, dtype=torch.bool))
    with pytest.raises(ConfigError, match="divide"):
        NystromAttention(10, 3)
