"""Compression of trained networks: against least squares and SVDs done by numpy, and against running the networks."""

import copy
import json
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from benchmarks import compression
from tests.cli.command import quintic
from tests.lowrank.matrices import randn
from tests.lowrank.networks import filled, mlp
from torch import nn
from torch.nn import functional as F

from quintic.core import CheckpointError, ConfigError, DataError
from quintic.lm import LanguageModel, LMConfig
from quintic.lowrank import compress, load_compressed
from quintic.lowrank.activations import Moments
from quintic.moe import MoE
from quintic.moe.experts import Experts
from quintic.moe.feedforward import FeedForward


class Gated(nn.Module):
    """As in transformers."""

    def __init__(self, d, f):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Own(nn.Module):
    """A form that has to be named."""

    def __init__(self, d, f):
        super().__init__()
        self.into, self.out = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x, shift=0.0):
        return self.out(torch.tanh(self.into(x)) + shift * 0)


def relative(made, true):
    return (torch.linalg.vector_norm(made - true) / torch.linalg.vector_norm(true)).item()


# Neurons


@pytest.mark.parametrize("bias", [True, False])
def test_the_next_layer_is_the_least_squares_fit_to_its_own_outputs(bias):
    net, x = mlp(5, 12, 4, bias=bias), randn(80, 5, seed=9)
    made = compress(net, [x[:50], x[50:]], keep=5)
    (kept,) = made.layers[0].kept
    H = net[1](net[0](x)).detach().numpy()[:, kept]
    if bias:
        H = np.column_stack([H, np.ones(len(H))])
    best = np.linalg.lstsq(H, net(x).detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(made.module[2].weight.detach().numpy(), best[:5].T, atol=1e-4)
    if bias:
        np.testing.assert_allclose(made.module[2].bias.detach().numpy(), best[5], atol=1e-4)
    assert torch.equal(made.module[0].weight, net[0].weight[kept])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("correct", [True, False])
def test_reported_errors_are_those_of_running_the_network(bias, correct):
    net, x, other = mlp(5, 12, 4, bias=bias), randn(60, 5, seed=9), randn(40, 5, seed=10)
    made = compress(net, [x], keep=6, held_out=[other], correct=correct)
    row = made.layers[0]
    assert row.error == pytest.approx(relative(made.module(x), net(x)), rel=1e-6)
    assert row.held_out_error == pytest.approx(relative(made.module(other), net(other)), rel=1e-6)
    assert row.before == (5, 12, 4) and row.after == (5, 6, 4) and row.samples == 60
    assert row.parameters_after == made.parameters_after == sum(p.numel() for p in made.module.parameters())
    assert "5-12-4" in repr(made) and f"{row.error:.4f}" in repr(made)


def forms():
    gated = filled(Gated(6, 8))
    fused = FeedForward(6, 8).double()
    fused.gate_up.data = torch.cat([gated.gate_proj.weight.data, gated.up_proj.weight.data])
    fused.down.data = gated.down_proj.weight.data.clone()
    stack = Experts(6, 8, 1).double()
    stack.gate_up.data, stack.down.data = fused.gate_up.data[None].clone(), fused.down.data[None].clone()
    return gated, fused, stack


def test_the_forms_of_one_network_are_cut_alike():
    gated, fused, stack = forms()
    x = randn(70, 6, seed=3)
    one = compress(gated, [x], keep=5)
    two = compress(fused, [x], keep=5)
    ids, gates = torch.zeros(70, 1, dtype=torch.int64), torch.ones(70, 1, dtype=torch.float64)
    three = compress(stack, [(x, ids, gates)], keep=5)
    for made in (two, three):
        assert torch.equal(made.layers[0].kept[0], one.layers[0].kept[0])
        assert made.layers[0].error == pytest.approx(one.layers[0].error, rel=1e-9)
    torch.testing.assert_close(two.module(x), one.module(x))
    torch.testing.assert_close(three.module(x, ids, gates), one.module(x))
    assert one.layers[0].error == pytest.approx(relative(one.module(x), gated(x)), rel=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_are_fitted_to_their_own_tokens_as_the_gates_weigh_them(gated):
    experts = filled(Experts(6, 20, 3, gated=gated))  # wider than the stream: neurons are read in slices
    x, ids = randn(90, 6, seed=1), torch.stack([torch.arange(90) % 3, (torch.arange(90) + 1) % 3], 1)
    gates = torch.rand(90, 2, generator=torch.Generator().manual_seed(2)).double()
    made = compress(experts, [(x, ids, gates)], keep=7)
    off = whole = 0.0
    for k in range(2):
        part = ids[:, k : k + 1], gates[:, k : k + 1]
        off += (made.module(x, *part) - experts(x, *part)).square().sum()
        whole += experts(x, *part).square().sum()
    assert made.layers[0].error == pytest.approx((off / whole).sqrt().item(), rel=1e-6)
    assert made.layers[0].samples == 60 and len(made.layers[0].kept) == 3
    # One expert by hand.
    rows, places = (ids == 1).nonzero(as_tuple=True)
    gate = gates[rows, places][:, None]
    h = x[rows] @ experts.get_parameter(experts.in_name)[1].T
    h = (F.silu(h[:, :20]) * h[:, 20:] if gated else F.silu(h)).detach()
    H, Y = (gate * h).numpy(), (gate * (h @ experts.down[1].detach().T)).numpy()
    best = np.linalg.lstsq(H[:, made.layers[0].kept[1]], Y, rcond=None)[0]
    np.testing.assert_allclose(made.module.down[1].detach().numpy(), best.T, atol=1e-4)


@pytest.mark.parametrize("normalize", [None, "rms"])
def test_neurons_that_others_make_up_for_cost_nothing(normalize):
    moe = filled(MoE(6, 8, 4, 2, normalize_experts=normalize))
    with torch.no_grad():
        for w_in, down in ((moe.experts.gate_up, moe.experts.down), (moe.shared.gate_up, moe.shared.down)):
            for rows in (slice(0, 8), slice(8, 16)):
                block = w_in[..., rows, :]
                block[..., 5:, :] = block[..., :3, :]
            down[..., 5:] *= 0.5
    x = randn(300, 6, seed=4)
    made = compress(moe, [x], keep=5)
    assert [row.after for row in made.layers] == [(6, 5, 6), (6, 5, 6)] and made.layers[0].parts == 4
    torch.testing.assert_close(made.module.eval()(x), moe.eval()(x), atol=1e-4, rtol=1e-3)


def test_the_choice_forgets_how_a_neuron_is_scaled():
    net, x = mlp(5, 12, 4), randn(80, 5, seed=9)
    scaled = copy.deepcopy(net)
    factors = torch.logspace(-2, 2, 12, dtype=torch.float64)
    with torch.no_grad():
        scaled[0].weight.mul_(factors[:, None])
        scaled[0].bias.mul_(factors)
        scaled[2].weight.div_(factors)
    for rule in ("quality", "norms-top", "weight-norms"):
        first, second = (compress(each, [x], keep=5, rule=rule).layers[0].kept[0] for each in (net, scaled))
        assert torch.equal(first, second), rule


def test_all_hidden_layers_of_a_chain_are_cut():
    net, x = mlp(6, 16, 14, 3), randn(400, 6, seed=2)
    made = compress(net, [x], keep={"0": 8, "2": 0.5}, held_out=[x])
    assert [layer.out_features for layer in made.module if isinstance(layer, nn.Linear)] == [8, 7, 3]
    assert [row.after for row in made.layers] == [(6, 8, 7), (8, 7, 3)]
    only = compress(net, [x], keep=8, layers=["0"])
    assert torch.equal(only.layers[0].kept[0], made.layers[0].kept[0])
    assert relative(made.module(x), net(x)) < relative(compress(net, [x], rule="uniform").module(x), net(x))


def test_a_layer_norm_between_keeps_neurons_apart():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"name the Linear layers.*\('fc1', 'fc2'\)"):
        compress(net, [torch.zeros(5, 4)])


def test_linear_layers_of_any_module_can_be_named():
    net, x = filled(Own(5, 12)), randn(60, 5, seed=1)
    made = compress(net, [{"x": x, "shift": 1.0}], keep=6, layers=[("into", "out")])
    assert made.layers[0].name == "into" and made.module.into.out_features == 6
    assert made.layers[0].error == pytest.approx(relative(made.module(x), net(x)), rel=1e-6)
    given = compress(net, [(x, None)], keep=6, layers=[("into", "out")], forward=lambda model, batch: model(batch[0]))
    assert torch.equal(given.module.into.weight, made.module.into.weight)


def test_correction_and_choice_each_lower_the_error():
    net, x = mlp(6, 40, 5), randn(500, 6, seed=2)
    errors = {
        (rule, correct): compress(net, [x], keep=12, rule=rule, correct=correct).layers[0].error
        for rule in ("quality", "uniform")
        for correct in (True, False)
    }
    assert errors["quality", True] < errors["uniform", True] < errors["uniform", False]
    assert errors["quality", True] < errors["quality", False]


def test_an_expert_without_tokens_stays_finite():
    experts = filled(Experts(6, 8, 2))
    x, ids = randn(40, 6), torch.zeros(40, 1, dtype=torch.int64)
    made = compress(experts, [(x, ids, torch.ones(40, 1).double())], keep=4)
    assert made.layers[0].samples == 0 and all(torch.isfinite(p).all() for p in made.module.parameters())
    # Nothing is known of it but its weights.
    assert torch.allclose(made.module.down[1], experts.down[1][:, made.layers[0].kept[1]])


# What holds for all


def test_moments_are_those_of_all_rows():
    x = randn(50, 4) + 2
    moments = Moments(4)
    for part in x.split(7):
        moments.add(part)
    v = randn(4, 1, seed=3)
    for centred in (True, False):
        y = (x - x.mean(0) if centred else x) @ v
        size = torch.linalg.vector_norm(moments.factor(centred=centred) @ v)
        assert float(size) == pytest.approx(float(torch.linalg.vector_norm(y)), rel=1e-4)


@pytest.mark.parametrize("method", ["neurons", "id", "magnitude"])
def test_the_original_is_untouched_unless_in_place(method):
    net, x = mlp(5, 12, 4).train(), randn(30, 5)
    before = copy.deepcopy(net.state_dict())
    made = compress(net, [x], method=method)
    assert made.module is not net and made.module.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in [*net.modules(), *made.module.modules()])
    same = compress(net, [x], method=method, in_place=True)
    assert same.module is net and torch.equal(net(x), made.module(x)) and net.training
    net(x).sum().backward()  # and it can be trained on
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("method", ["neurons", "svd", "magnitude"])
def test_a_state_dict_loads_back(method, tmp_path):
    net, x = mlp(5, 12, 10, 4), randn(60, 5)
    made = compress(net, [x], method=method).module
    torch.save(made.state_dict(), tmp_path / "state.pt")
    again = load_compressed(mlp(5, 12, 10, 4, seed=5), torch.load(tmp_path / "state.pt"))
    assert torch.equal(again(x), made(x)) and repr(again) == repr(made)
    with pytest.raises(CheckpointError):
        load_compressed(mlp(5, 12, 4), made.state_dict())
    with pytest.raises(CheckpointError):
        load_compressed(nn.Sequential(nn.ReLU(), nn.Linear(5, 4)).double(), made.state_dict())


def test_a_share_of_neurons_is_rounded_and_a_number_of_weights_refused():
    net, x = mlp(4, 3, 2), randn(20, 4)
    assert compress(net, [x], keep=0.6).layers[0].after == (4, 2, 2)
    assert compress(net, [x], keep=0.01).layers[0].after == (4, 1, 2)
    with pytest.raises(ConfigError, match=r"keep = 2 for layer '0'; expected a share of its weights up to 1\.0$"):
        compress(net, [x], keep=2, method="magnitude")


def test_what_was_frozen_stays_frozen():
    net = mlp(4, 8, 3).requires_grad_(False)
    smaller = compress(net, [randn(20, 4)], keep=0.5).module
    assert not any(p.requires_grad for p in smaller.parameters())


def test_a_seed_decides_everything():
    net, x = mlp(6, 40, 40, 5), randn(100, 6)

    def kept(rule, seed):
        return [row.kept[0].tolist() for row in compress(net, [x], rule=rule, seed=seed).layers]

    for rule in ("uniform", "quality"):
        assert kept(rule, 3) == kept(rule, 3)
    assert kept("uniform", 3) != kept("uniform", 4)
    assert kept("uniform", 3)[0] != kept("uniform", 3)[1]


@pytest.fixture(scope="module")
def language_model():
    return LanguageModel(LMConfig(vocab_size=40, context=16, d_model=16, d_ff=24, d_expert=8, num_experts=4), seed=0)


def test_a_language_model_keeps_its_architecture(language_model):
    ids = torch.randint(40, (16, 16), generator=torch.Generator().manual_seed(0))
    made = compress(language_model, [ids[:8], ids[8:]], keep={"blocks.*.ffn": 12, "blocks.*.ffn.*": 4})
    smaller = LanguageModel(LMConfig(vocab_size=40, context=16, d_model=16, d_ff=12, d_expert=4, num_experts=4), seed=1)
    smaller.load_state_dict(made.module.state_dict())
    torch.testing.assert_close(smaller(ids), made.module(ids))
    again = load_compressed(copy.deepcopy(language_model), made.module.state_dict())
    torch.testing.assert_close(again(ids), made.module(ids))
    whole = compress(language_model, [ids], keep=1.0).module
    torch.testing.assert_close(whole(ids), language_model(ids), atol=1e-5, rtol=1e-4)


def test_the_attention_of_a_language_model_takes_low_ranks(language_model):
    ids = torch.randint(40, (8, 16), generator=torch.Generator().manual_seed(0))
    made = compress(language_model, [ids], keep=1.0, method="svd", layers=["blocks.*.attention.q"])
    assert len(made.layers) == 3
    torch.testing.assert_close(made.module(ids), language_model(ids), atol=1e-4, rtol=1e-3)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 13}, "keep = 13 for layer '0'; expected a share of its neurons up to 1.0, or a number from 1 to 12"),
        ({"keep": 0}, "keep = 0 "),
        ({"keep": 0.0}, "keep = 0.0 "),
        ({"keep": 1.5}, "keep = 1.5 "),
        ({"keep": True}, "keep = True "),
        ({"keep": {"0": "half"}}, "keep = 'half' "),
        ({"keep": 5, "method": "svd"}, "number from 1 to 4"),
        ({"keep": 5, "method": "magnitude"}, "share of its weights up to 1.0$"),
        ({"method": "neuron"}, "did you mean 'neurons'"),
        ({"rule": "qualty"}, "unknown rule 'qualty'; did you mean 'quality'"),
        ({"rule": "weight-norms", "method": "id"}, "unknown rule 'weight-norms'"),
        ({"keep": {"2": 3}, "layers": ["0"], "method": "id"}, "keep says nothing of layer '0'"),
        ({"layers": ["net.0"]}, "no layer of a known form is named 'net.0'"),
        ({"layers": [("0", "3")]}, "no layer '3'"),
        ({"layers": [("0", "1")]}, "'1' is a ReLU; expected a Linear layer"),
        ({"layers": [("2", "0")]}, "'0' reads 5 neurons and the layers before it have 4"),
        ({"layers": [("0",)]}, "the layers that go in and the one that reads"),
        ({"layers": [("0", "2")], "method": "svd"}, "tuples are for method='neurons'"),
    ],
)
def test_unusable_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        compress(mlp(5, 12, 4), [randn(30, 5)], **options)


def test_unusable_data_is_named():
    net, x = mlp(5, 12, 4), randn(30, 5)
    with pytest.raises(DataError, match="the calibration data is empty"):
        compress(net, [])
    with pytest.raises(DataError, match="the held-out data is empty"):
        compress(net, [x], held_out=[])
    bad = x.clone()
    bad[3, 2] = torch.inf
    with pytest.raises(DataError, match="the calibration data, batch 1: an activation of layer '0' is not finite"):
        compress(net, [x, bad], in_place=True)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert net[0].out_features == 12


def test_layers_that_are_never_reached_or_shared_are_named():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = mlp(5, 6, 5), mlp(5, 6, 5)

        def forward(self, x):
            return self.used(x)

    x = randn(30, 5)
    with pytest.raises(ConfigError, match=r"never reached layer 'idle.0'"):
        compress(Lazy(), [x])
    assert compress(Lazy(), [x], layers=["used.*"]).layers[0].name == "used.0"
    tied = mlp(6, 6, 6)
    tied[2].weight = tied[0].weight
    with pytest.raises(ConfigError, match="shared with another layer"):
        compress(tied, [randn(30, 6)])
    linear = nn.Linear(6, 6).double()
    with pytest.raises(ConfigError, match="shared with another layer"):
        compress(nn.Sequential(linear, nn.ReLU(), linear), [randn(30, 6)], method="svd")
    with pytest.raises(ConfigError, match="no linear layer within it"):
        compress(nn.Sequential(nn.ReLU()), [x], method="svd")


# The benchmark


def test_the_benchmark_at_a_small_size(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    names = ("neurons by ID", "by ID, next layer as it was", "neurons by chance", "ranks by SVD of outputs")
    monkeypatch.setattr(compression, "METHODS", {name: compression.METHODS[name] for name in names})
    monkeypatch.setattr(compression, "PLOTTED", names)
    (tmp_path / "book.txt").write_text("".join(map(chr, 97 + np.random.default_rng(0).integers(0, 9, 20_000))))
    tiny = (str(tmp_path / "book.txt"), "--size", "tiny", "engine.steps=2", "lm.num_layers=2")
    monkeypatch.setattr(compression.demo, "quintic", quintic)
    found = compression.run((0, 1), (0,), 5, tiny, tmp_path, ((0.5,), (0.5,)), 1000, tmp_path, 1)
    found = json.loads(json.dumps(found))
    sizes = {(row["method"], row["real"]) for row in found["digits"] + found["model"] if row["method"] != "whole"}
    assert {name for name, _ in sizes} == set(names) and all(0.45 < real <= 0.5 for _, real in sizes)
    right = {name: compression.values(found["digits"], name, 0.5, "right") for name in names}
    text = compression.section(found)
    assert f"{sum(right['neurons by ID']) / 2:.1%}" in text and "`python -m benchmarks compression`" in text
    assert [claim.command for claim in compression.claims(found)] == ["compression"] * 2
    assert found["recovery"]["steps"] == 1 and f"{found['recovery']['after']:.3f} after" in text
    for name, svg in compression.plots(found).items():
        ET.fromstring(svg)
        assert f"benchmarks/plots/{name}.svg" in text


def test_too_little_calibration_data_is_said():
    net = mlp(5, 12, 4)
    with pytest.warns(UserWarning, match="0 saw 11 rows of calibration data and has 12 neurons"):
        compress(net, [randn(11, 5)], keep=6)
    with pytest.warns(UserWarning, match="2 saw 11 rows of calibration data and has 12 inputs"):
        compress(net, [randn(11, 5)], keep=2, method="svd", layers=["2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(net, [randn(12, 5)], keep=6)
        compress(net, [randn(3, 5)], keep=6, rule="weight-norms", correct=False)
        for method in ("svd-plain", "magnitude"):
            compress(net, [randn(3, 5)], keep=0.5, method=method)
