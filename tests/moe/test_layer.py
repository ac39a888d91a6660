"""The layer as its user meets it: any shape and dtype, own training loops, checkpointing, copies, compiled."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.core.roles import Role, declared_roles
from quintic.moe import AuxLoss, LossFree, MoE, NoBalance, balance_step
from quintic.moe.router import routed_scaling_factor
from quintic.optim import Muon

OPTIONS = [
    {},
    {"num_shared": 0},
    {"num_shared": 2, "score": "softmax", "normalize_gates": False},
    {"score": "relu", "select": "sigmoid", "normalize_experts": "rms"},
    {"score": "smooth_topk", "normalize_experts": "l2"},
    {"num_groups": 4, "top_groups": 2, "gated": False, "activation": "gelu"},
    {"top_k": 8, "normalize_experts": "rms"},
    {"top_k": 1, "normalize_gates": False},
]


def make(seed=0, **options) -> MoE:
    layer = MoE(**({"d_model": 16, "d_expert": 8, "num_experts": 8, "top_k": 2} | options))
    initialize_(layer, seed)
    return layer


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(v, kind):
    if kind is None:
        return v
    rms = (v.square().mean(-1, keepdim=True) + 1e-8).sqrt()
    return v / rms / (v.shape[-1] ** 0.5 if kind == "l2" else 1.0)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_is_its_formula(options):
    """y = shared(x) + sum of gate_i e_i over the chosen, every expert as a dense network of its own."""
    layer, x = make(**options).double(), tokens(12, 16).double()
    routing = layer.router(x)
    expected = torch.zeros_like(x) if layer.shared is None else unit(layer.shared(x), layer.normalize_experts)
    stack = layer.experts.get_parameter(layer.experts.in_name)
    act = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}[layer.experts.activation]
    for n in range(12):
        for e, gate in zip(routing.ids_nk[n].tolist(), routing.gates_nk[n], strict=True):
            h = stack[e] @ x[n]
            a = act(h.chunk(2)[0]) * h.chunk(2)[1] if layer.experts.gated else act(h)
            expected[n] = expected[n] + gate * unit(layer.experts.down[e] @ a, layer.normalize_experts)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stream_is_added_to_the_result(options, dtype):
    layer, x, stream = make(**options).to(dtype), tokens(5, 40, 16).to(dtype), tokens(5, 40, 16, seed=1).to(dtype)
    stream.requires_grad_()
    y = layer(x, plus=stream)
    assert not y._is_view()
    torch.testing.assert_close(y, layer(x) + stream)
    y.sum().backward()
    torch.testing.assert_close(stream.grad, torch.ones_like(stream))


def test_hooks_of_a_part_see_that_part_alone():
    layer, x, stream, seen = make(), tokens(40, 16), tokens(40, 16, seed=1), {}
    before = layer(x, plus=stream)
    for name in ("experts", "shared"):
        getattr(layer, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    torch.testing.assert_close(layer(x, plus=stream), before)
    torch.testing.assert_close(seen["shared"], layer.shared(x))
    torch.testing.assert_close(stream + seen["experts"] + seen["shared"], before)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("num_shared", 1) and o.get("top_k") != 8])
def test_branches_have_equal_rms_at_initialisation(options):
    """What the computed routed scale is for; the post's mean of 1 / norm is a little more than 1 / RMS."""
    layer = make(**(options | {"d_model": 128, "d_expert": 64, "num_experts": 32, "balance": NoBalance()}))
    x = tokens(2000, 128)
    shared = unit(layer.shared(x), layer.normalize_experts)
    routed = layer(x) - shared
    assert (routed.square().mean() / shared.square().mean()).sqrt().item() == pytest.approx(1.0, abs=0.15)


def test_normalised_experts_forget_the_scale_of_their_weights_and_keep_the_layers():
    layer, x = make(normalize_experts="rms", num_shared=0, out_scale=0.25), tokens(10, 16)
    y = layer(x)
    with torch.no_grad():
        layer.experts.down.mul_(100.0)
    torch.testing.assert_close(layer(x), y, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(make(normalize_experts="rms", num_shared=0)(x), 4.0 * y, rtol=1e-3, atol=1e-3)
    l2 = make(normalize_experts="l2", num_shared=0, out_scale=0.25)
    torch.testing.assert_close(l2(x), y / 4.0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_computed_scale_is_that_of_the_layers_own_router(options):
    layer = make(**options)
    names = {"score", "select", "normalize_gates", "num_groups", "top_groups"} & options.keys()
    assert layer.router.scale == routed_scaling_factor(8, layer.router.top_k, **{name: options[name] for name in names})
    assert make(**options, route_scale=1.5).router.scale == 1.5


def test_sizes_and_scale_of_the_shared_branch_and_of_the_output():
    x = tokens(10, 16)
    for shared in (1, 3):
        plain, quiet = make(num_shared=shared), make(num_shared=shared, out_scale=0.25)
        assert plain.shared.down.shape == (16, shared * 8) and plain.shared.gate_up.shape == (2 * shared * 8, 16)
        torch.testing.assert_close(quiet(x), 0.25 * plain(x))
        torch.testing.assert_close(quiet.shared(x), 0.25 * plain.shared(x))


@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (5, 16), (2, 3, 16), (2, 1, 3, 16), (2, 0, 16)])
def test_any_leading_shape(shape):
    layer = make()
    x = tokens(*shape).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape and layer.counts.sum() == 2 * x.numel() // 16
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())  # zeros without tokens
    torch.testing.assert_close(y.reshape(-1, 16), layer(x.reshape(-1, 16)))


def test_a_mask_changes_what_is_counted_and_nothing_else():
    layer, x = make(), tokens(2, 5, 16)
    mask = torch.arange(10).view(2, 5) < 7
    y = layer(x, mask)
    assert layer.counts.sum() == 14
    torch.testing.assert_close(y, layer(x))
    with pytest.raises(ConfigError, match=r"mask has shape \(5, 2\); expected \(2, 5\)"):
        layer(x, mask.t())
    with pytest.raises(ConfigError, match=r"mask has dtype torch.int64; expected torch.bool"):
        layer(x, mask.long())
    with pytest.raises(ConfigError, match="x has width 15"):
        layer(x[..., :15])


@pytest.mark.parametrize("options", [{"d_model": 7}, {"normalize_experts": "rms"}, {"score": "softmax"}])
def test_whole_layer_by_finite_differences(options):
    layer = make(**({"d_model": 6, "d_expert": 3, "num_experts": 3} | options)).double()
    x = tokens(3, layer.router.weight.shape[1]).double().requires_grad_()
    parameters = dict(layer.named_parameters())
    function = lambda x, *p: torch.func.functional_call(layer, dict(zip(parameters, p, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


def test_bfloat16_layer_and_autocast_route_like_float32():
    layer, x = make(d_model=32, d_expert=16), tokens(200, 32)
    exact = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x)
    assert half.router.bias.dtype == torch.float32 and cast.dtype == torch.bfloat16
    assert torch.equal(layer.router(x).ids_nk, copy.deepcopy(layer).router(x).ids_nk)
    same = (layer.router(x).ids_nk == half.router(x.bfloat16()).ids_nk).all(1)
    assert same.double().mean() > 0.9
    for y, rows in ((half(x.bfloat16()), same), (cast, same | True)):
        assert (y.float() - exact)[rows].norm() / exact[rows].norm() < 0.02


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, Muon])
def test_learns_in_a_loop_of_ones_own(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), MoE(16, 16, 4, 2, balance=LossFree()))
    target = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    own = {torch.optim.SGD: 0.3, torch.optim.AdamW: 0.01, Muon: 0.03}
    steps = optimizer(model if optimizer is Muon else model.parameters(), lr=own[optimizer])
    losses = []
    for step in range(80):
        x = tokens(64, 16, seed=step)
        loss = (model(x) - target(x).detach()).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        stats = balance_step(model)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert stats[0].tokens == 64 and model[1].router.bias.abs().sum() > 0


def test_roles_of_all_parameters_are_declared():
    layer = make(router_offset=True)
    roles = declared_roles(layer)
    assert set(roles) == {name for name, _ in layer.named_parameters()}
    assert roles["experts.gate_up"].role is Role.EXPERT_STACK and roles["experts.gate_up"].split == {"blocks": 2}
    assert declared_roles(make(gated=False))["experts.up"].split is None
    assert roles["router.weight"].role is Role.ROUTER and roles["router.offset"].role is Role.VECTOR


def test_weights_are_drawn_unless_asked_not_to():
    torch.manual_seed(5)
    first, second = MoE(64, 32, 8, 2), MoE(64, 32, 8, 2)
    for name, role in declared_roles(first).items():
        one, two = first.get_parameter(name), second.get_parameter(name)
        assert one.std().item() == pytest.approx(role.init.std, rel=0.1) and not torch.equal(one, two)
    torch.manual_seed(5)
    assert torch.equal(MoE(64, 32, 8, 2).experts.down, first.experts.down)
    before = torch.random.get_rng_state()
    MoE(64, 32, 8, 2, initialize=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_neither_gradients_nor_counts(reentrant):
    layer = make()
    x = tokens(20, 16).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    counts = layer.counts.clone()
    layer.meter.reset()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for a, b in zip((x, *layer.parameters()), expected, strict=True):
        torch.testing.assert_close(a.grad, b)
    assert torch.equal(layer.counts, counts)


def test_copies_and_saved_states_are_the_same_layer(tmp_path):
    layer, x = make(balance=LossFree(rate=0.1), router_offset=True), tokens(30, 16)
    layer(x)
    balance_step(layer)
    y = layer(x)
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone(x), y, rtol=0, atol=0)
    with torch.no_grad():
        clone.experts.down.zero_()
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = make(seed=1, router_offset=True)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    assert "router.bias" in layer.state_dict() and not any("counts" in name for name in layer.state_dict())


def test_same_bits_every_time():
    layer = make(d_model=32, d_expert=16)
    x = tokens(300, 32).requires_grad_()
    runs = [torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters())) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_random_router_uses_all_experts_and_a_zero_one_would_not():
    """Why the router starts random: with equal scores every token takes the lowest indices."""
    layer, x = make(), tokens(500, 16)
    assert (layer.router(x).counts_e > 0).all()
    nn.init.zeros_(layer.router.weight)
    assert layer.router(x).counts_e.tolist() == [500, 500] + [0] * 6


def test_the_default_path_compiles_as_one_graph():
    layer = make()
    x = tokens(24, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    counts = layer.counts.clone()
    layer.meter.reset()
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert torch.equal(layer.counts, counts) and counts.sum() == 48
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("balance", [LossFree(), LossFree("quantile") + AuxLoss(0.1)])
def test_plain_compilation_has_no_graph_break(balance):
    """Without ``fullgraph``, which also lets operators pass whose result has a size that depends on the data."""
    layer, x = make(balance=balance), tokens(3, 8, 16)
    for mask in (None, tokens(3, 8) > 0):
        torch._dynamo.reset()
        assert torch._dynamo.explain(layer)(x, mask).graph_break_count == 0
    torch._dynamo.reset()
    assert torch._dynamo.explain(layer.eval())(x).graph_break_count == 0


def test_autocast_leaves_float64_alone():
    layer, x = make().double(), tokens(40, 16).double()
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
@pytest.mark.parametrize("grad", [True, False])
def test_tokens_of_another_dtype_are_refused(dtype, grad):
    with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match=f"x is {dtype}, the experts are torch.float32"):
        make()(tokens(3, 16).to(dtype))


def test_a_bias_step_too_large_for_softmax_scores_is_said():
    many = {"num_experts": 32, "score": "softmax"}
    with pytest.warns(UserWarning, match='select="sigmoid"'):
        make(**many)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"select": "sigmoid"}, {"balance": LossFree(rate=1e-4)}, {"balance": AuxLoss()}):
            make(**many, **options)
        make(score="softmax", num_experts=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"num_shared": -1}, "num_shared"),
        ({"normalize_experts": "rm"}, "did you mean 'rms'"),
        ({"normalize_experts": True}, "expected one of: l2, rms"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"score": "sigmod"}, "did you mean 'sigmoid'"),
        ({"top_k": 1}, "without gradient"),
        ({"route_scale": -1.0}, "route_scale must be at least 0"),
        ({"balance": "sign"}, r"LossFree\('sign'\).*found 'sign'"),
        ({"balance": LossFree}, "balance must be a balancer"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
