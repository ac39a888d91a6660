"""The fused causal attention against torch's operators in float64, and what no bit of it depends on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import quintic.lm.mla as mla
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.attention import causal_attention, fits_causal_attention
from quintic.lm.rope import rotate, rotation_table

pytestmark = needs_kernels

TINY = LMConfig()
SHAPES = [  # batch, time, heads, width without position, rotated width, width of values
    (1, 1, 1, 2, 2, 1), (2, 1, 3, 16, 16, 32), (2, 7, 3, 4, 6, 5), (3, 64, 2, 16, 16, 32), (2, 33, 2, 32, 32, 64),
    (1, 300, 2, 128, 64, 128), (1, 500, 1, 2, 2, 70), (1, 217, 5, 10, 30, 24),
]  # fmt: skip


def made(b, t, h, n, p, v, *, size=1.0, seed=0):
    """q, kv, rotated key, table and an incoming gradient; the rotated key as columns of a wider matrix."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, t, h * (n + p), generator=g) * size
    kv, latent = torch.randn(b, t, h * (n + v), generator=g), torch.randn(b, t, 3 + p, generator=g)
    return q, kv, latent[..., 3:], rotation_table(t, p, 10_000.0, still=n), torch.randn(b, t, h * v, generator=g)


def fused(q, kv, key, table, dout):
    """Output and gradients of q, kv and key."""
    leaves = [x.detach().requires_grad_() for x in (q, kv, key)]
    out = causal_attention(*leaves, table, (2 * table.shape[1]) ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def exact(q, kv, key, table, dout):
    """The same, written out in float64."""
    (b, t, _), (p, e) = q.shape, (key.shape[-1], 2 * table.shape[1])
    leaves = [x.detach().double().requires_grad_() for x in (q, kv, key)]
    query, kv, key = leaves
    h, wide = q.shape[-1] // e, table.to(torch.complex128)
    query = rotate(query.view(b, t, h, e).transpose(1, 2), wide)
    k_nope, value = kv.view(b, t, h, -1).transpose(1, 2).tensor_split([e - p], dim=-1)
    key = rotate(key, wide[:, (e - p) // 2 :])[:, None].expand(-1, h, -1, -1)
    logits = query @ torch.cat([k_nope, key], -1).mT * e**-0.5
    weights = logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    out = (weights @ value).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def assert_close(found, expected, tolerance=2e-6):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * (b.norm() + b.numel() ** 0.5)  # dq of a first token is 0


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape):
    assert_close(fused(*made(*shape)), exact(*made(*shape)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 230), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 90), st.integers(0, 99),
)  # fmt: skip
def test_any_widths_and_lengths(b, t, h, n, p, v, seed):
    """Whole vectors and panels, remainders, fewer numbers than a vector has lanes."""
    given_ = made(b, t, h, 2 * n, 2 * p, v, seed=seed)
    assert_close(fused(*given_), exact(*given_))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_threads_changes_no_bit(shape):
    given_, threads, found = made(*shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(fused(*given_))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_equal(found[0], other)


def test_a_sequence_alone_has_the_bits_it_has_in_a_batch():
    q, kv, key, table, dout = made(5, 100, 3, 8, 10, 20)
    together = fused(q, kv, key, table, dout)
    for i in (0, 3):
        alone = fused(*(x[i : i + 1] for x in (q, kv, key)), table, dout[i : i + 1])
        assert_equal(alone, [x[i : i + 1] for x in together])


@pytest.mark.parametrize("cut", [1, 5, 31, 64, 130])
@pytest.mark.parametrize("what", ["other", "nan", "absent"])
def test_later_tokens_change_no_bit_of_earlier_outputs(cut, what):
    q, kv, key, table, dout = made(2, 131, 2, 16, 16, 40)
    before = fused(q, kv, key, table, dout)[0][:, :cut]
    if what == "absent":
        after = fused(*(x[:, :cut] for x in (q, kv, key)), table[:cut], dout[:, :cut])[0]
    else:
        changed = [x.clone() for x in (q, kv, key)]
        for x in changed:
            x[:, cut:] = x[:, cut:] * -3e4 if what == "other" else torch.nan
        after = fused(*changed, table, dout)[0]
        assert what == "other" or after[:, cut:].isnan().all()
    assert torch.equal(after[:, :cut], before)


@pytest.mark.parametrize("place", ["q", "kv", "key", "dout"])
def test_a_nan_is_seen(place):
    given_ = dict(zip(("q", "kv", "key", "table", "dout"), made(1, 60, 2, 4, 4, 8), strict=True))
    given_[place] = given_[place].clone()
    given_[place][0, 30] = torch.nan
    out, *grads = fused(*given_.values())
    seen = out[0].isnan().all(-1)
    last = {"q": 31, "dout": 30}.get(place, 60)
    assert seen[30:last].all() and not seen[:30].any() and not seen[last:].any()
    assert all(grad.isnan().any() for grad in grads)


def test_huge_logits_pick_one_value():
    """Logits of 1e4: a weight is 0 or 1 but where two of them are close."""
    given_ = made(2, 90, 2, 16, 16, 32, size=1e4)
    found, expected = fused(*given_), exact(*given_)
    assert all(x.isfinite().all() for x in found)
    assert_close(found[:1], expected[:1], 1e-3)


def test_equal_logits_are_a_mean():
    q, kv, key, table, dout = made(1, 50, 1, 2, 2, 3)
    out = fused(torch.zeros_like(q), kv, key, table, dout)[0]
    mean = kv[0, :, 2:].double().cumsum(0) / torch.arange(1, 51)[:, None]
    torch.testing.assert_close(out[0].double(), mean, rtol=1e-6, atol=1e-6)


def test_inputs_need_not_be_contiguous():
    q, kv, key, table, dout = made(3, 40, 2, 8, 8, 12)
    expected = fused(*(x.contiguous() for x in (q, kv, key)), table, dout)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    assert_equal(fused(q, kv, key, table, dout), expected)
    assert_equal(fused(strided(q), strided(kv), strided(key), table, strided(dout)), expected)
    assert_equal(fused(q, kv, key.contiguous().mT.contiguous().mT, table.mT.contiguous().mT, dout), expected)
    summed = [x.detach().requires_grad_() for x in (q, kv, key)]
    causal_attention(*summed, table, 0.25).sum().backward()  # the gradient of a sum has strides of 0
    assert_equal([x.grad for x in summed], fused(q, kv, key, table, torch.ones_like(dout))[1:])


def test_what_it_leaves_to_torch():
    q, kv, key, table, _ = made(1, 4, 1, 2, 2, 3)
    assert fits_causal_attention(q, kv, key, table)
    assert not fits_causal_attention(q.double(), kv, key, table)
    assert not fits_causal_attention(q, kv, key, torch.view_as_real(table))
    assert not fits_causal_attention(q, kv, key, table[:1])
    assert not fits_causal_attention(q, kv.to("meta"), key, table)
    assert not fits_causal_attention(q[:0], kv[:0], key[:0], table)
    for time, width, fits in ((8192, 64, True), (8193, 4, False), (4096, 128, True), (4097, 128, False)):
        wide = torch.empty(1, 1, 1).expand(1, time, width)
        assert fits_causal_attention(wide, wide, wide, table[:1, :1].expand(time, width // 2)) == fits


def test_gradients_of_gradients_are_refused():
    q, kv, key, table, _ = made(1, 4, 1, 2, 2, 3)
    out = causal_attention(q.requires_grad_(), kv, key, table, 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_operators_are_declared_as_they_are():
    q, kv, key, table, dout = made(2, 9, 2, 4, 4, 6)
    torch.library.opcheck(torch.ops.quintic.causal_attention, (q, kv, key, table, 0.5), test_utils=CHECKS)
    out, lse = torch.ops.quintic.causal_attention(q, kv, key, table, 0.5)
    torch.library.opcheck(
        torch.ops.quintic.causal_attention_backward, (dout, q, kv, key, table, out, lse, 0.5), test_utils=CHECKS
    )


CHECKS = ("test_schema", "test_faketensor")


def losses(config, monkeypatch, text, *, kernels, train=True):
    """Loss and gradients of a model; how often torch's attention ran."""
    calls, original = [], F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
        if not kernels:
            patch.setattr(mla, "fits_causal_attention", lambda *a: False)
        model = LanguageModel(config, seed=0).train(train)
        loss = model(text[:, :-1], targets=text[:, 1:])
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], len(calls)


@pytest.mark.parametrize("changes", [{}, {"q_rank": 16}, {"checkpoint": True}, {"v_dim": 24}, {"v_dim": 40}])
def test_a_model_has_the_same_loss_and_gradients(changes, monkeypatch):
    config = replace(TINY, dense=True, **changes)
    text = torch.randint(0, config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(0))
    found, expected = (losses(config, monkeypatch, text, kernels=kernels) for kernels in (True, False))
    assert found[2] == 0 < expected[2]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_qk_clip_needs_the_logits_in_training_only(monkeypatch):
    config = replace(TINY, dense=True, qk_clip=50.0)
    text = torch.randint(0, config.vocab_size, (2, 20))
    assert losses(config, monkeypatch, text, kernels=True)[2] == config.num_layers
    assert losses(config, monkeypatch, text, kernels=True, train=False)[2] == 0


def test_flops_are_counted_as_for_torchs_attention(monkeypatch):
    """Which counts none on a CPU."""
    config, text, counted = replace(TINY, dense=True), torch.zeros(2, 20, dtype=torch.int64), []
    for kernels in (True, False):
        with FlopCounterMode(display=False) as counter:
            losses(config, monkeypatch, text, kernels=kernels)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
