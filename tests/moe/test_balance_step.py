"""The layer's load: counted exactly once, used after the batch that made it; routing kept for the backward pass."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.moe import AuxLoss, LossFree, MoE, NoBalance, ZLoss, aux_loss, balance_step, meter, replay
from quintic.moe.replay import KeptRouting

CHECKPOINTS = {"none": None, "reentrant": True, "other": False}


def make(balance=None, experts=4, width=16):
    layer = MoE(width, 8, num_experts=experts, top_k=2, balance=balance)
    initialize_(layer, 0)
    return layer, torch.randn(10, width, generator=torch.Generator().manual_seed(0), requires_grad=True)


def run(layer, x, kind):
    return layer(x) if kind == "none" else checkpoint(layer, x, use_reentrant=CHECKPOINTS[kind])


@pytest.mark.parametrize("over", ["batch", "sequence", "global"])
def test_a_loss_keeps_its_gradient_when_more_is_counted_before_the_recomputation(over):
    found = []
    for kind in ("none", "other"):
        layer, x = make(AuxLoss(1.0, over=over))
        for part in x.detach().view(2, 5, 16) + torch.eye(2, 16).unsqueeze(1):
            run(layer, part.unsqueeze(0).requires_grad_(), kind)
        aux_loss(layer).backward()
        found.append(layer.router.weight.grad)
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_load_is_counted_once_under_activation_checkpointing(kind):
    layer, x = make(LossFree("quantile"))
    run(layer, x, kind).sum().backward()
    assert layer.counts.sum() == 20
    assert layer.meter.histogram.sum() == 40  # every token has a margin to every expert
    assert layer.meter.sums[1] == 10


class Two(nn.Module):
    """Two layers in one checkpoint, so that an operator of the second has those of the first before it."""

    def __init__(self):
        super().__init__()
        balance = LossFree("quantile") + AuxLoss(0.1) + AuxLoss(0.1, over="global")
        self.layers = nn.ModuleList(make(balance)[0] for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("saved", ["none", "products", "choices", "experts", "kept"])
def test_selective_checkpoints_count_once_and_have_the_same_gradient(saved):
    operators = {
        "products": torch.ops.aten.mm.default,
        "choices": torch.ops.aten.topk.default,
        "experts": torch.ops.quintic.routed_forward.default,
        "kept": torch.ops.quintic.kept_routing.default,
    }

    def policy(context, operator, *args, **kwargs):
        keep = operator == operators.get(saved)
        return CheckpointPolicy.PREFER_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    found, x = [], torch.randn(30, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for chosen in (None, partial(create_selective_checkpoint_contexts, policy)):
        model = Two()
        y = model(x) if chosen is None else checkpoint(model, x, use_reentrant=False, context_fn=chosen)
        (y.square().sum() + aux_loss(model)).backward()
        assert [layer.counts.sum() for layer in model.layers] == [60, 60]
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_torch_that_does_not_tell_recomputations_trains_and_says_so(monkeypatch):
    """The one private name that is asked for; without checkpoints nothing depends on it."""
    expected, x = make()
    layer = copy.deepcopy(expected)
    expected(x).sum().backward()
    replay._tell.cache_clear()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.warns(UserWarning, match="does not tell") as told:
        layer(x).sum().backward()
        layer(x)
    assert len(told) == 1
    assert torch.equal(layer.counts, 2 * expected.counts)
    assert torch.equal(layer.router.weight.grad, expected.router.weight.grad)


def test_nested_checkpoints_count_once():
    layer, x = make()
    inner = partial(checkpoint, layer, use_reentrant=False)
    checkpoint(inner, x, use_reentrant=False).sum().backward()
    assert layer.counts.sum() == 20


@pytest.mark.parametrize("rule", ["floored-rms", "quantile"])
def test_micro_batches_add_up_and_evaluation_does_not_count(rule):
    layer, x = make(LossFree(rule, 0.1))
    other = copy.deepcopy(layer)
    layer(x)
    for part in x.split(3):
        other(part)
    other.eval()
    other(x)
    for a, b in zip(layer.meter.counters, other.meter.counters, strict=True):
        # Sums of real numbers agree within the unit they are rounded to.
        torch.testing.assert_close(a, b, rtol=0, atol=1000 if a.shape == (4,) else 0)
    balance_step(layer)
    balance_step(other)
    assert torch.equal(layer.router.bias, other.router.bias) and layer.router.bias.any()


def test_padding_is_left_out_of_every_counter():
    layer, x = make(LossFree("quantile") + AuxLoss(1.0))
    mask = torch.arange(10) < 7
    whole, part = copy.deepcopy(layer), copy.deepcopy(layer)
    whole(x, mask)
    part(x[:7])
    for a, b in zip(whole.meter.counters, part.meter.counters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1000 if a.shape == (4,) else 0)
    torch.testing.assert_close(aux_loss(whole), aux_loss(part))


def test_bias_moves_after_the_batch_and_routes_the_next():
    layer, x = make()
    before = layer(x)
    assert torch.equal(layer.router.bias, torch.zeros(4))
    (stats,) = balance_step(nn.Sequential(layer))
    assert stats.tokens == 10 and sum(stats.load) == pytest.approx(1.0) and stats is layer.stats
    assert stats.bias == layer.router.bias.tolist() and 0 < stats.entropy < 1.4
    assert layer.counts.sum() == 0 and layer.router.bias.abs().sum() > 0
    layer.router.bias.zero_()
    torch.testing.assert_close(layer(x), before)


def test_the_bias_is_in_checkpoints_and_the_counters_are_not():
    layer, x = make(LossFree("quantile"))
    layer(x)
    balance_step(layer)
    state = layer.state_dict()
    assert "router.bias" in state and not any(name.startswith("meter") for name in state)
    again, _ = make(LossFree("quantile"))
    again.load_state_dict(state)
    for each in (layer, again):
        each(x)
        balance_step(each)
    assert torch.equal(layer.router.bias, again.router.bias)


def test_counters_are_where_the_weights_are_loaded():
    layer, x = make(LossFree("quantile"))
    with torch.device("meta"):
        other = MoE(16, 8, num_experts=4, top_k=2, balance=LossFree("quantile"), initialize=False)
    other.load_state_dict(layer.state_dict(), assign=True)
    torch.testing.assert_close(other(x), layer(x))
    for a, b in zip(other.meter.counters, layer.meter.counters, strict=True):
        assert torch.equal(a, b) and a.any()


def test_counters_survive_a_cast_of_the_model():
    layer, x = make()
    layer(x)
    layer.bfloat16()
    assert layer.counts.dtype == torch.int64 and layer.counts.sum() == 20


def test_a_layer_made_without_memory_starts_from_zero(monkeypatch):
    """As for a model that is divided before it has weights: to_empty hands out memory with anything in it."""
    monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=7))
    with torch.device("meta"):
        layer = MoE(16, 8, num_experts=4, top_k=2, balance=LossFree("quantile"))
    layer.to_empty(device="cpu")
    assert not layer.router.bias.any() and layer.router.weight.eq(7).all()
    assert not any(counter.any() for counter in layer.meter.counters)
    layer, x = make(LossFree("sign", 1.0))
    layer(x)
    balance_step(layer)
    layer(x)
    layer.balance = AuxLoss(1.0)
    layer(x)
    layer.reset_parameters()
    assert not layer.router.bias.any() and not layer.counts.any() and aux_loss(layer) == 0


def test_a_loaded_bias_is_float32_whatever_was_saved():
    layer, x = make(LossFree("sign", 0.001))
    saved = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    saved["router.bias"] += 5
    layer.load_state_dict(saved, assign=True)
    layer(x.detach().bfloat16())
    balance_step(layer)
    assert layer.router.bias.dtype == torch.float32
    assert (layer.router.bias != 5).any()  # in bfloat16 a step of 0.001 would vanish


def test_a_copy_leaves_the_losses_of_the_original_behind():
    layer, x = make(AuxLoss(0.1))
    layer(x)
    other = copy.deepcopy(layer)
    assert aux_loss(other) == 0 and aux_loss(layer) > 0


def test_a_loop_that_forgets_to_balance_is_told(recwarn, monkeypatch):
    monkeypatch.setattr(meter, "_MANY", 30)
    monkeypatch.setattr(meter, "_MANY_LOSSES", 20)
    warnings.simplefilter("always")  # one warning must not hide the next of the same text
    layer, x = make(AuxLoss(0.1))
    for _ in range(21):
        layer(x)
    assert "20 auxiliary losses" in str(recwarn.pop(UserWarning).message)
    for balance, told in ((LossFree(), 1), (NoBalance(), 0)):
        layer, x = make(balance)
        recwarn.clear()
        for _ in range(29):
            layer(x[:1])
        assert not recwarn.list
        for _ in range(3):
            layer(x[:1])
        assert ["balance_step(model)" in str(each.message) for each in recwarn] == [True] * told
        balance_step(layer)
        recwarn.clear()
        for _ in range(29):
            layer(x[:1])
        assert not recwarn.list


def test_a_layer_checks_that_its_balancer_fits():
    with pytest.raises(ConfigError, match="2 shares for 4 experts"):
        make(LossFree(target=(0.5, 0.5)))


def test_an_auxiliary_loss_must_be_used():
    layer, x = make(AuxLoss(0.1))
    layer(x)
    with pytest.raises(ConfigError, match="aux_loss"):
        balance_step(layer)
    loss = aux_loss(layer)
    assert loss > 0 and aux_loss(layer) == 0
    (stats,) = balance_step(layer)
    assert stats.aux_loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_auxiliary_loss_has_the_same_gradient_under_checkpointing_or_is_refused():
    gradients = []
    for kind in ("none", "other"):
        layer, x = make(AuxLoss(1.0, over="global"))
        y = run(layer, x, kind)
        (y.square().sum() + aux_loss(layer)).backward()
        gradients.append(layer.router.weight.grad)
        balance_step(layer)
    torch.testing.assert_close(*gradients)
    layer, x = make(AuxLoss(1.0))
    run(layer, x, "reentrant")
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        aux_loss(layer)


@pytest.mark.parametrize("kind", ["reentrant", "other"])
def test_routing_is_kept_for_the_backward_pass(kind):
    """Scores that differ in the recomputation - here by a bias - must not send tokens elsewhere."""
    plain, x = make(experts=8)
    kept = copy.deepcopy(plain)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    y = run(kept, x, kind)
    with torch.no_grad():
        kept.router.bias[2] += 0.02
        moved = (kept.router(x).ids_nk != plain.router(x).ids_nk).double().mean()
    assert 0 < moved < 0.5
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(kept.router.weight.grad, plain.router.weight.grad)


def test_kept_routing_finds_its_micro_batch_in_any_order():
    found = {}

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found[ctx.name] = kept(again[ctx.name])
            return grad, None

    kept = KeptRouting()
    g = torch.Generator().manual_seed(0)
    first = {name: torch.randint(0, 16, (50 - 10 * (name == "b"), 2), generator=g) for name in "abc"}
    again = {name: ids.clone() for name, ids in first.items()}
    for ids in again.values():
        ids[7, 0] += 1
    again["new"] = torch.randint(0, 16, (50, 2), generator=g)
    for ids in first.values():
        assert torch.equal(kept(ids), ids)
    x = torch.ones(1, requires_grad=True)
    sum(Backward.apply(x, name) for name in again).sum().backward()
    assert all(torch.equal(found[name], first[name]) for name in "abc")
    assert torch.equal(found["new"], again["new"])
    kept.clear()
    Backward.apply(x, "a").sum().backward()
    assert torch.equal(found["a"], again["a"])


class Routed(nn.Module):
    """Router and meter, called as the layer calls them."""

    def __init__(self, balance):
        super().__init__()
        self.layer, _ = make(balance)

    def forward(self, x):
        layer, rows = self.layer, x.shape[:-1]
        routing = layer.router(x.reshape(-1, 16), shift=layer.balance.shift(rows, 2), keep=layer.kept)
        layer.meter.observe(layer.balance, routing, None, rows)
        return routing.gates_nk


@pytest.mark.parametrize("balance", [LossFree(), LossFree("quantile") + ZLoss(), AuxLoss(1.0, over="sequence")])
def test_compiles_in_one_graph_that_counts_once_too(balance):
    x = torch.randn(2, 9, 16)
    plain = Routed(balance)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    gates = plain(x)
    torch.testing.assert_close(run(x), gates)
    loss, other = aux_loss(plain.layer), aux_loss(compiled.layer)
    torch.testing.assert_close(other, loss)
    if loss:
        loss.backward()
        other.backward()
        torch.testing.assert_close(compiled.layer.router.weight.grad, plain.layer.router.weight.grad)
    else:
        y = checkpoint(run, x.requires_grad_(), use_reentrant=False)
        plain(x)
        y.square().sum().backward()
    for a, b in zip(compiled.layer.meter.counters, plain.layer.meter.counters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1000 if a.shape == (4,) else 0)
