"""Settings: refused where wrong, by name; and the optimizer that they build."""

import ast
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import quintic.optim.config as config_module
from quintic.core import ConfigError
from quintic.optim import Muon, OptimConfig, build_optimizer


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 20))


def train(net, optimizer, steps=10):
    ids = torch.arange(20)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids), (3 * ids + 1) % 20)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "sgd"),
        ("name", 3),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", "0.1"),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", True),
        ("weight_decay", -0.1),
        ("adamw_lr", -0.5),
        ("adamw_lr", float("inf")),
        ("adamw_weight_decay", float("nan")),
        ("momentum", 1.0),
        ("nesterov", 1),
        ("scale", "adam"),
        ("coefficients", "quintc"),
        ("ns_dtype", "float16"),
        ("momentum_form", "mean"),
        ("adamw_beta1", 1.0),
        ("adamw_beta2", -0.1),
        ("adamw_eps", -1e-8),
        ("clip_norm", 0.0),
        ("schedule", "linear"),
        ("warmup_fraction", 1.5),
        ("decay_fraction", -0.1),
        ("decay_fraction", 0.99),
        ("decay_shape", "sqrt"),
        ("final_lr_fraction", 2.0),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"optim\.{name}\b"):
        OptimConfig(**{name: value})


def test_a_close_name_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        OptimConfig(name="adam")
    with pytest.raises(ConfigError, match="did you mean 'quintic'"):
        OptimConfig(coefficients="quintc")


def test_whole_numbers_and_the_edges_are_fine():
    OptimConfig(lr=1, weight_decay=0, momentum=0, clip_norm=float("inf"), warmup_fraction=0.6, decay_fraction=0.4)
    OptimConfig(schedule="cosine", warmup_fraction=0.9, decay_fraction=0.5)  # cosine has no decay phase


def test_frozen_and_every_field_has_its_line_of_help():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig().lr = 1.0
    body = next(
        node.body for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)
    )
    for field in dataclasses.fields(OptimConfig):
        i = next(i for i, n in enumerate(body) if isinstance(n, ast.AnnAssign) and n.target.id == field.name)
        assert isinstance(body[i + 1].value.value, str)


def test_muon_gets_the_settings():
    net = model()
    optimizer = build_optimizer(
        net,
        OptimConfig(lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=False, scale="rms", coefficients="su",
                    adamw_beta1=0.8, adamw_beta2=0.9, adamw_eps=1e-6),
    )  # fmt: skip
    assert isinstance(optimizer, Muon)
    assert {g["algorithm"] for g in optimizer.param_groups} == {"muon", "adamw"}
    for group in optimizer.param_groups:
        got = {k: group[k] for k in ("lr", "weight_decay", "momentum", "nesterov", "scale", "coefficients")}
        assert got == {
            "lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "nesterov": False, "scale": "rms", "coefficients": "su",
        }  # fmt: skip
        assert group["adamw_betas"] == (0.8, 0.9)
        assert group["adamw_eps"] == 1e-6
        assert group["ns_dtype"] is None


@pytest.mark.parametrize(
    ("settings", "muon", "adamw"),
    [
        ({}, (0.02, 0.3), (0.02, 0.3)),
        ({"adamw_lr": 0.004, "adamw_weight_decay": 0.0}, (0.02, 0.3), (0.004, 0.0)),
        ({"adamw_lr": 0.0}, (0.02, 0.3), (0.0, 0.3)),
        ({"adamw_lr": 0.004, "adamw_weight_decay": 0.0, "name": "adamw"}, None, (0.02, 0.3)),  # one half has one rate
    ],
)
def test_each_half_gets_its_rate_and_decay_and_keeps_the_peak(settings, muon, adamw):
    for group in build_optimizer(model(), OptimConfig(lr=0.02, weight_decay=0.3, **settings)).param_groups:
        expected = muon if group["algorithm"] == "muon" else adamw
        assert (group["lr"], group["weight_decay"]) == expected and group["initial_lr"] == group["lr"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("decay", "spectral"), ("decay_rank", 3), ("momentum_form", "sum"), ("norm", "schatten:4")],
)
def test_every_setting_of_a_group_arrives(name, value):
    optimizer = build_optimizer(model(), OptimConfig(**{name: value}))
    assert {group[name] for group in optimizer.param_groups} == {value}


def test_settings_of_the_optimizer_and_of_clipping_arrive():
    optimizer = build_optimizer(
        model(), OptimConfig(cap=0.7, distributed="gather", vectors="sign", embeddings="row-l2")
    )
    assert (optimizer.cap, optimizer.distributed) == (0.7, "gather")
    assert {group["layout"] for group in optimizer.param_groups} == {"stack", "elements", "rows"}
    assert build_optimizer(model(), OptimConfig()).cap is None
    clip = OptimConfig(clip="adaptive", clip_norm=3.0, clip_quantile=0.5, clip_window=7).make_clipping()
    assert (clip.kind, clip.max_norm, clip.quantile) == ("adaptive", 3.0, 0.5)
    clip.load_state_dict({"steps": 9, "clipped": 0, "nonfinite": 0, "norms": [float(i) for i in range(9)]})
    assert clip.norms == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_precision_of_the_matrix_sign_can_be_chosen(name):
    assert {g["ns_dtype"] for g in build_optimizer(model(), OptimConfig(ns_dtype=name)).param_groups} == {name}


def test_adamw_is_torch_adamw_over_the_whole_model():
    ours, theirs = model(), model()
    a = build_optimizer(ours, OptimConfig(name="adamw", lr=3e-3))
    b = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    assert train(ours, a) == train(theirs, b)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sorted(n for g in a.state_dict()["param_groups"] for n in g["param_names"]) == sorted(
        n for n, _ in ours.named_parameters()
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_both_learn(name):
    net = model()
    assert train(net, build_optimizer(net, OptimConfig(name=name, lr=0.02)), 60) < 0.1
