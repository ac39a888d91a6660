"""Latent attention in one step, from the residual stream to the residual stream, against the module's own parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from quintic.core.initial import initialize_
from quintic.lm import LanguageModel, LMConfig, mla, mla_kernel
from quintic.lm.block import Block
from quintic.lm.mla import LatentAttention
from quintic.lm.norm import RMSNorm
from quintic.lm.rope import rotation_table

pytestmark = needs_kernels

SMALL = LMConfig(d_model=16, num_heads=2, qk_nope_dim=4, qk_rope_dim=4, v_dim=8, kv_rank=8)


def made(config, b, t, seed=0):
    """Attention, the norm before it, a stream, the table of positions and an incoming gradient."""
    c, g = config, torch.Generator().manual_seed(seed)
    attention, norm = LatentAttention(c, out_scale=1.0), RMSNorm(c.d_model, 1e-6)
    initialize_(attention, seed), initialize_(norm, seed)
    with torch.no_grad():
        for gain in (norm.gain, attention.kv_norm.gain):
            gain.copy_(torch.rand(gain.shape, generator=g) + 0.5)
    x, dy = torch.randn(2, b, t, c.d_model, generator=g)
    return attention, norm, x, rotation_table(t, c.qk_rope_dim, 10_000.0, still=c.qk_nope_dim), dy


def parameters(attention, norm):
    return [*norm.parameters(), *attention.parameters()]


def gradients(y, x, attention, norm, dy):
    leaves = [p for p in parameters(attention, norm) if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)]


def fused(attention, norm, x, rotation, dy):
    x = x.clone().requires_grad_()
    y = attention.add_to_stream(x, norm, rotation)
    assert y is not None
    return gradients(y, x, attention, norm, dy)


def by_parts(attention, norm, x, rotation, dy):
    x = x.clone().requires_grad_()
    return gradients(x + attention(norm(x), rotation), x, attention, norm, dy)


def assert_close(given_):
    """To float64, as close as float32 by the parts: few numbers in a row may have a norm of nearly 0."""
    attention, norm, x, rotation, dy = given_
    found, usual = fused(*given_), by_parts(*given_)
    wide = attention.double(), norm.double(), x.double(), rotation.to(torch.complex128), dy.double()
    for a, b, c in zip(found, usual, by_parts(*wide), strict=True):
        assert a.shape == c.shape and (a - c).norm() <= 4 * (b - c).norm() + 3e-6 * (c.norm() + 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20),
    st.integers(1, 50), st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_are_those_of_float64(b, h, n, p, v, r, d, seed):
    """Whatever the widths, and with one token more or less than whole blocks have."""
    config = replace(SMALL, d_model=d, num_heads=h, qk_nope_dim=2 * n, qk_rope_dim=2 * p, v_dim=v, kv_rank=2 * r)
    given_ = made(config, b, -(-8 * max(d, 2 * r, h * v) // b) + seed % 3, seed)
    assert_close(given_)


@pytest.mark.parametrize("shape", [(16, 128), (9, 1000)])
def test_many_tokens_are_summed_in_parts(shape):
    given_ = made(SMALL, *shape)
    assert_close(given_)


def test_the_number_of_threads_changes_no_bit():
    given_, threads, found = made(SMALL, 7, 200), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(fused(*given_))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_inputs_need_not_be_contiguous():
    attention, norm, x, rotation, dy = made(SMALL, 3, 60)
    expected = fused(attention, norm, x, rotation, dy)
    attention.q.weight.data = attention.q.weight.data.t().contiguous().t()

    def strided(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    found = fused(attention, norm, strided(x), rotation, strided(dy))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frozen", ["q", "kv_down", "kv_norm", "kv_up", "out", "norm", "all"])
def test_frozen_weights_get_no_gradient(frozen):
    given_ = made(SMALL, 3, 60)
    attention, norm = given_[:2]
    for name, module in [*attention.named_children(), ("norm", norm)]:
        module.requires_grad_(frozen not in (name, "all"))
    assert_close(given_)


def test_a_nan_stays_in_its_sequence_and_behind_it():
    attention, norm, x, rotation, _ = made(SMALL, 3, 60)
    x[1, 20, 5] = torch.nan
    bad = attention.add_to_stream(x, norm, rotation).isnan().any(-1)
    assert bad[1, 20:].all() and not bad[1, :20].any() and not bad[[0, 2]].any()


def test_what_it_leaves_to_the_parts():
    attention, norm, x, rotation, _ = made(SMALL, 4, 32)

    def takes(x=x):
        return attention.add_to_stream(x, norm, rotation) is not None

    assert takes() and not takes(x[:3]) and not takes(x.double()) and not takes(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes()
    for module in (attention, norm, attention.q, attention.kv_norm, attention.out):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(lambda *seen: None)
            assert not takes()
            hook.remove()
    assert takes()
    own = attention.out
    attention.out = nn.Linear(16, 16, bias=False)
    assert not takes()
    attention.out = own
    attention.q.weight.data = attention.q.weight.data.double()
    assert not takes()
    for changes in ({"q_rank": 8}, {"qk_clip": 10.0}):
        other, norm, x, rotation, _ = made(replace(SMALL, **changes), 4, 32)
        assert other.add_to_stream(x, norm, rotation) is None


def passes(block, x, rotation, dy, run):
    leaf = x.clone().requires_grad_()
    y = run(block, leaf, rotation)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], dy)]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_block_is_the_same_by_its_parts_with_and_without_checkpoints(dense, reentrant, monkeypatch):
    config = replace(LMConfig(num_layers=1, num_dense_layers=int(dense)))
    block = Block(config, 0)
    initialize_(block, 0)
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 9, 64, config.d_model, generator=g)
    rotation = rotation_table(64, config.qk_rope_dim, 10_000.0, still=config.qk_nope_dim)

    def run(block, x, rotation):
        return block(x, rotation) if reentrant is None else checkpoint(block, x, rotation, use_reentrant=reentrant)

    found = passes(block, x, rotation, dy, run)
    hooks = [m.register_forward_hook(lambda *seen: None) for m in (block.attention, block.ffn, block.ffn_norm)]
    calls = []
    monkeypatch.setattr(mla, "fused_latent_attention", lambda *a: calls.append(a))
    expected = passes(block, x, rotation, dy, run)
    assert not calls and len(hooks) == 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("changes", [{"num_dense_layers": 1}, {"num_shared": 0}, {"num_shared": 1}])
def test_a_block_returns_no_view(changes):
    """Of one fully_shard warns: a change in place would drop its hook."""
    config = replace(LMConfig(num_layers=1, num_dense_layers=0), **changes)
    block = Block(config, 0)
    initialize_(block, 0)
    rotation = rotation_table(64, config.qk_rope_dim, 10_000.0, still=config.qk_nope_dim)
    y = block(torch.randn(9, 64, config.d_model), rotation)
    assert y.requires_grad and y._base is None


def test_hooks_see_what_they_always_saw():
    """Of a module alone, without the stream, whether there are kernels or not."""
    config = LMConfig(num_layers=1, num_dense_layers=1)
    model, seen = LanguageModel(config, seed=0), {}
    text = torch.randint(config.vocab_size, (10, 64), generator=torch.Generator().manual_seed(0))
    before = model(text)
    (block,) = model.blocks
    for name in ("attention", "ffn"):
        getattr(block, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    block.register_forward_hook(lambda m, i, o: seen.update(inputs=i[0], outputs=o))
    torch.testing.assert_close(model(text), before)
    torch.testing.assert_close(seen["inputs"] + seen["attention"] + seen["ffn"], seen["outputs"])


def test_operators_are_declared_as_they_are():
    attention, norm, x, rotation, dy = made(SMALL, 2, 64)
    weights = [p.detach() for p in (norm.gain, attention.q.weight, attention.kv_down.weight, attention.kv_norm.gain)]
    weights += [attention.kv_up.weight.detach(), attention.out.weight.detach()]
    sizes, checks, own = [2, 4, 4, 8, 8], ("test_schema", "test_faketensor"), torch.ops.quintic
    torch.library.opcheck(own.latent_attention, (x, rotation, weights, sizes, 1e-6, 1e-6), test_utils=checks)
    _, *kept = own.latent_attention(x, rotation, weights, sizes, 1e-6, 1e-6)
    for needed in ([True] * 6, [True, False] * 3):
        arguments = (dy, x, rotation, weights, kept, sizes, needed)
        torch.library.opcheck(own.latent_attention_backward, arguments, test_utils=checks)


def test_flops_are_counted_as_for_the_parts(monkeypatch):
    attention, norm, x, rotation, dy = made(SMALL, 4, 64)
    counted = []
    for by_parts in (False, True):
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = leaf + attention(norm(leaf), rotation) if by_parts else attention.add_to_stream(leaf, norm, rotation)
            y.backward(dy)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_gradients_of_gradients_are_refused():
    attention, norm, x, rotation, _ = made(SMALL, 4, 32)
    y = attention.add_to_stream(x.requires_grad_(), norm, rotation)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_less_is_kept_for_the_backward_pass_than_by_the_parts():
    attention, norm, x, rotation, _ = made(SMALL, 4, 64)
    kept = []
    for by_parts in (False, True):
        saved = {}

        def pack(t, saved=saved):
            saved[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            leaf = x.clone().requires_grad_()
            _ = leaf + attention(norm(leaf), rotation) if by_parts else attention.add_to_stream(leaf, norm, rotation)
        kept.append(sum(saved.values()))
    assert kept[0] < kept[1]


def test_the_limit_is_the_width_it_is_measured_by():
    """Eight tokens for each column of the widest matrix."""
    for changes in ({}, {"kv_rank": 20}, {"v_dim": 15}):
        config = replace(SMALL, **changes)
        widest = max(config.d_model, config.kv_rank, config.num_heads * config.v_dim)
        for missing in (0, 1):
            attention, norm, x, rotation, _ = made(config, 1, mla_kernel._ROWS * widest - missing)
            assert (attention.add_to_stream(x, norm, rotation) is None) == bool(missing)
