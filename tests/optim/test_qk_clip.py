"""QK-clip on real attention: the largest logit of a head becomes tau, and no other head changes."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.optim.toy import randn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.core import ConfigError
from quintic.lm.config import LMConfig
from quintic.lm.mla import LatentAttention
from quintic.lm.rope import rotation_table
from quintic.optim.qk_clip import clip_factors, clip_latent_qk_, clip_qk_, max_logits, split_heads


@settings(max_examples=50, deadline=None)
@given(
    b=st.integers(1, 3),
    g=st.integers(1, 3),
    per_group=st.integers(1, 3),
    t=st.integers(1, 9),
    longer=st.integers(0, 5),
    d=st.integers(1, 5),
    causal=st.booleans(),
    piece=st.sampled_from([1, 7, 50, 10**6]),
    seed=st.integers(0, 100),
)
def test_max_logits_matches_all_logits(b, g, per_group, t, longer, d, causal, piece, seed):
    h, s = g * per_group, t + longer
    q, k = randn(b, h, t, d, seed=seed), randn(b, g, s, d, seed=seed + 1)
    logits = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(per_group, dim=1)).abs() / math.sqrt(d)
    if causal:
        seen = torch.arange(s) <= torch.arange(t)[:, None] + (s - t)
        logits = torch.where(seen, logits, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quintic.optim.qk_clip._LOGITS", piece)
        found = max_logits(q, k, causal=causal)
    torch.testing.assert_close(found, logits.amax((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("piece", [1, 60, 2**20])
def test_max_logits_of_allowed_pairs(monkeypatch, batch, heads, piece):
    monkeypatch.setattr("quintic.optim.qk_clip._LOGITS", piece)
    q, k = randn(2, 4, 6, 3), randn(2, 4, 6, 3, seed=1)
    allowed = randn(batch, heads, 6, 6, seed=2) > 0
    logits = (q @ k.mT).abs() * 0.3
    expected = torch.where(allowed, logits, 0.0).amax((0, 2, 3))
    torch.testing.assert_close(max_logits(q, k, scale=0.3, allowed=allowed), expected)


def test_max_logits_never_holds_all_logits():
    """16 heads x 2048 x 2048 logits would be 256 MB; the largest tensor made must stay far below."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    q = randn(1, 16, 2048, 2)
    with Largest():
        max_logits(q, q)
    assert Largest.elements <= 2**21


def test_max_logits_edges():
    q = randn(1, 2, 3, 4, dtype=torch.bfloat16)
    assert max_logits(q, q).dtype == torch.float32
    assert max_logits(q.double(), q.double()).dtype == torch.float64
    q[0, 1, 2, 0] = math.nan
    found = max_logits(q, q)
    assert found[0].isfinite()
    assert not found[1].isfinite()
    assert max_logits(q[:, :, :0], q[:, :, :0]).tolist() == [0.0, 0.0]
    assert max_logits(q, q[:, :, :0]).tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="g dividing h"):
        max_logits(randn(1, 3, 2, 2), randn(1, 2, 2, 2))
    with pytest.raises(ConfigError, match="g dividing h"):
        max_logits(randn(1, 2, 2, 2), randn(1, 2, 2, 3))
    queries = randn(1, 1, 2, 2).requires_grad_()
    assert not max_logits(queries, queries).requires_grad


def attend(q_weight, k_weight, x, heads, key_heads):
    """(queries, keys) of plain attention without positions."""
    b, t, _ = x.shape
    q = F.linear(x, q_weight).view(b, t, heads, -1).transpose(1, 2)
    k = F.linear(x, k_weight).view(b, t, key_heads, -1).transpose(1, 2)
    return q, k


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_multi_head_and_grouped_query(key_heads):
    heads, d, width = 4, 3, 10
    x = randn(2, 7, width)
    q_weight = torch.nn.Parameter(randn(heads * d, width, seed=1))
    k_weight = torch.nn.Parameter(randn(key_heads * d, width, seed=2))
    before_q, before_k = q_weight.detach().clone(), k_weight.detach().clone()
    before = max_logits(*attend(q_weight, k_weight, x, heads, key_heads))
    tau = before.sort().values[1:3].mean().item()  # two heads above, two below
    views = split_heads(q_weight, heads, d)[0], split_heads(k_weight, key_heads, d)[0]
    gamma = clip_qk_(*views, before, tau)

    after = max_logits(*attend(q_weight, k_weight, x, heads, key_heads))
    over = before > tau
    assert over.sum() == 2
    torch.testing.assert_close(after[over], torch.full((2,), tau), rtol=1e-5, atol=0)
    torch.testing.assert_close(after[~over], before[~over], rtol=1e-6, atol=0)
    torch.testing.assert_close(gamma, (tau / before.double()).clamp(max=1.0))
    assert torch.equal(q_weight.view(heads, d, width)[~over], before_q.view(heads, d, width)[~over])
    if key_heads < heads:
        assert torch.equal(k_weight, before_k)
    else:
        ratio_q = q_weight.view(heads, -1)[:, 0] / before_q.view(heads, -1)[:, 0]
        ratio_k = k_weight.view(heads, -1)[:, 0] / before_k.view(heads, -1)[:, 0]
        torch.testing.assert_close(ratio_q, ratio_k)
    assert q_weight.grad is None
    assert q_weight.is_leaf


def test_a_fused_projection_with_bias_is_clipped_through_slices():
    heads, d, width = 2, 4, 6
    x = randn(3, 5, width)
    fused = torch.nn.Linear(width, 3 * heads * d)
    kept = fused.weight.detach().clone()

    def logits():
        q, k, _ = fused(x).view(3, 5, 3, heads, d).permute(2, 0, 3, 1, 4)
        return max_logits(q, k)

    before = logits()
    tau = before.mean().item()
    for tensor in (fused.weight, fused.bias):
        q, k, _ = tensor.chunk(3)
        clip_qk_(split_heads(q, heads, d)[0], split_heads(k, heads, d)[0], before, tau)
    after = logits()
    torch.testing.assert_close(after, before.clamp(max=tau), rtol=1e-5, atol=0)
    assert torch.equal(fused.weight[2 * heads * d :], kept[2 * heads * d :])


def latent(seed, dtype=torch.float32, q_rank=0):
    """A layer of this package with known sizes; built here, so that no preset can change the test."""
    config = LMConfig(d_model=24, num_heads=4, qk_nope_dim=6, qk_rope_dim=4, v_dim=5, kv_rank=10, q_rank=q_rank)
    layer = LatentAttention(config, out_scale=1.0)
    for i, p in enumerate(layer.parameters()):
        p.data.copy_(randn(*p.shape, seed=seed + i) if p.ndim > 1 else torch.ones_like(p))
    return layer.to(dtype)


def logits_of(layer, x, monkeypatch):
    """Largest logit per head, read off the call that the layer itself makes."""
    found = []

    def watched(query, key, value, *, attn_mask=None, is_causal=False, scale=None):
        found.append(max_logits(query, key, scale=scale, causal=is_causal))
        return original(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)

    original = F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        patch.setattr("quintic.lm.mla.fits_causal_attention", lambda *inputs: False)
        layer(x, rotation_table(x.shape[1], 4, 10000.0, still=6))
    (one,) = found
    return one


@pytest.mark.parametrize("q_rank", [0, 7])
def test_latent_attention_of_this_package(monkeypatch, q_rank):
    layer = latent(5, q_rank=q_rank)
    x = randn(3, 8, 24)
    before = logits_of(layer, x, monkeypatch)
    tau = before.sort().values[1:3].mean().item()
    kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
    q_nope, q_rope = split_heads(layer.q.weight, 4, 6, 4)
    k_nope, _ = split_heads(layer.kv_up.weight, 4, 6, 5)
    gamma = clip_latent_qk_(q_nope, q_rope, k_nope, before, tau)

    after = logits_of(layer, x, monkeypatch)
    over = before > tau
    assert over.sum() == 2
    torch.testing.assert_close(after[over], torch.full((2,), tau), rtol=1e-5, atol=0)
    torch.testing.assert_close(after[~over], before[~over], rtol=1e-6, atol=0)

    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, kept[name])}
    assert changed == {"q.weight", "kv_up.weight"}  # the shared rotated key is in kv_down
    q_ratio = (layer.q.weight / kept["q.weight"]).view(4, 10, -1).double()
    kv_ratio = (layer.kv_up.weight / kept["kv_up.weight"]).view(4, 11, -1).double()
    for h in range(4):
        root = gamma[h].sqrt().item()
        torch.testing.assert_close(q_ratio[h, :6], torch.full_like(q_ratio[h, :6], root), rtol=1e-6, atol=0)
        torch.testing.assert_close(q_ratio[h, 6:], torch.full_like(q_ratio[h, 6:], root**2), rtol=1e-6, atol=0)
        torch.testing.assert_close(kv_ratio[h, :6], torch.full_like(kv_ratio[h, :6], root), rtol=1e-6, atol=0)
        assert torch.equal(kv_ratio[h, 6:], torch.ones_like(kv_ratio[h, 6:]))  # values


def test_half_precision_weights_are_rounded_once():
    weight = randn(4, 6, dtype=torch.bfloat16)
    expected = (weight.float() * 0.1).bfloat16()
    clip_qk_(split_heads(weight, 1, 4)[0], split_heads(weight.clone(), 1, 4)[0], torch.tensor([1e4]), 100.0)
    assert torch.equal(weight, expected)


def test_factors():
    found = clip_factors(torch.tensor([0.0, 99.0, 100.0, 200.0, math.inf, math.nan]))
    assert found.tolist() == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="tau"):
            clip_factors(torch.ones(1), tau)


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"expected 2 heads x 3 \+ 1 = 8"):
        split_heads(torch.zeros(9, 2), 2, 3, 1)
    q, k = torch.zeros(4, 3, 5), torch.zeros(3, 3, 5)
    with pytest.raises(ConfigError, match="4 heads of queries cannot share 3"):
        clip_qk_(q, k, torch.ones(4))
    with pytest.raises(ConfigError, match="query has 4 heads and there are 2 logits"):
        clip_qk_(q, q, torch.ones(2))
    with pytest.raises(ConfigError, match="k_nope has 3 heads"):
        clip_latent_qk_(q, q, k, torch.ones(4))
