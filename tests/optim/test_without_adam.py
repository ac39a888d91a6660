"""Other trust regions for matrices, and rules other than AdamW for what is not a matrix."""

import copy
import pickle

import pytest
import torch
from tests.optim.toy import randn
from torch import nn

from quintic.core import ConfigError
from quintic.linalg import schatten_direction
from quintic.optim import Muon, OptimConfig, build_optimizer, diagnose, roles, snapshot


class Model(nn.Module):
    def __init__(self, dtype=torch.float64, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)  # the first convolution: not under Muon
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.proj(self.norm(x + self.conv(x.mT).mT)).tanh()
        return self.lm_head(x * self.temperature)


def set_grads(model, seed):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=100 * seed + i, dtype=p.dtype)


@pytest.mark.parametrize("p", ["1", "1.5", "2", "4", "inf"])
@pytest.mark.parametrize("scale", ["none", "rms"])
def test_matrices_move_along_the_direction_of_their_norm(p, scale):
    w = nn.Parameter(randn(3, 6, 9, dtype=torch.float64))
    before = w.detach().clone()
    w.grad = randn(3, 6, 9, seed=1, dtype=torch.float64)
    Muon([w], lr=0.1, weight_decay=0.0, norm=f"schatten:{p}", scale=scale, coefficients="exact").step()
    step = (before - w.detach()) / 0.1
    direction = schatten_direction(w.grad, float(p))
    if scale == "rms":
        direction = direction / direction.square().mean((-2, -1), keepdim=True).sqrt() * 0.2
    torch.testing.assert_close(step, direction, atol=1e-5, rtol=1e-5)


def test_groups_may_have_norms_of_their_own():
    a, b = (nn.Parameter(torch.zeros(4, 6).double()) for _ in range(2))
    a.grad = b.grad = randn(4, 6, seed=2, dtype=torch.float64)
    Muon([{"params": [a], "norm": "schatten:2"}, {"params": [b]}], lr=1.0, scale="none").step()
    torch.testing.assert_close(a.detach(), -a.grad / a.grad.norm())
    assert torch.linalg.svdvals(b.detach()).min() > 0.9
    with pytest.raises(ConfigError, match="unknown norm"):
        Muon([a], norm="schatten:0")


@pytest.mark.parametrize("nesterov", [True, False])
def test_every_rule_is_what_it_says(nesterov):
    """Against each rule written out, with momentum, over three steps; the RMS of each is Adam's 0.2."""
    for vectors in ("sign", "l2"):
        model = Model()
        optimizer = Muon(model, lr=0.1, weight_decay=0.2, vectors=vectors, embeddings="row-l2", nesterov=nesterov)
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for step in range(3):
            set_grads(model, step + 1)
            for name, p in model.named_parameters():
                m = momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
                u = 0.95 * m + 0.05 * p.grad if nesterov else m
                if name in ("embed.weight", "lm_head.weight"):
                    u = u / u.norm(dim=1, keepdim=True) * 8**0.5
                elif vectors == "sign":
                    u = u.sign()
                else:
                    u = u / u.norm() * u.numel() ** 0.5
                expected[name] = expected[name] * (1 - 0.1 * 0.2) - 0.1 * 0.2 * u
            optimizer.step()
        for name, p in model.named_parameters():
            if name != "proj.weight":
                torch.testing.assert_close(p.detach(), expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_table_says_so_and_nothing_is_left_to_adam():
    model = Model()
    table = roles(model, scale="keller", vectors="sign", embeddings="row-l2", strict=True)
    assert {row.algorithm for row in table} == {"muon"}
    assert table.parameters_under("muon") == sum(p.numel() for p in model.parameters())
    assert table["embed.weight"].parts[0][:3] == (20, 8, 1)  # a row is a map from one token to 8 outputs
    assert table["embed.weight"].scale == pytest.approx(8**0.5)
    assert table["lm_head.weight"].parts[0][:3] == (20, 1, 8) and table["lm_head.weight"].scale == 1.0
    assert table["temperature"].parts[0][:3] == (1, 1, 1)
    assert "each row" in table["embed.weight"].why and "sign" in table["norm.weight"].why
    assert roles(model, vectors="l2")["norm.weight"].parts[0][:3] == (1, 1, 8)
    assert roles(model, vectors="l2")["embed.weight"].algorithm == "adamw"
    optimizer = Muon(model, vectors="sign", embeddings="row-l2", decay="spectral")
    set_grads(model, 1)
    optimizer.step()
    keys = {key for state in optimizer.state.values() for key in state}
    assert keys == {"momentum_buffer", "top_space"}  # no second moments
    assert [p for p in model.parameters() if "top_space" in optimizer.state[p]] == [model.proj.weight]
    for option in ("vectors", "embeddings"):
        with pytest.raises(ConfigError, match=f"unknown {option} 'adam'.*did you mean 'adamw'"):
            Muon(model, **{option: "adam"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", ["state dict", "pickle", "deepcopy"])
def test_resume_is_bit_exact_with_all_options(through, dtype):
    options = {"vectors": "l2", "embeddings": "row-l2", "norm": "schatten:4", "cap": 0.5, "scale": "rms", "lr": 0.02}
    model = Model(dtype, tied=True)
    optimizer = Muon(model, **options)
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    if through == "state dict":
        again = Model(dtype, tied=True)
        again.load_state_dict(model.state_dict())
        resumed = Muon(again, **options)
        resumed.load_state_dict(optimizer.state_dict())
    elif through == "pickle":
        again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        again, resumed = copy.deepcopy((model, optimizer))
    seen = []
    resumed.register_step_pre_hook(lambda *_: seen.append("pre"))
    resumed.register_step_post_hook(lambda *_: seen.append("post"))
    for net, opt in ((model, optimizer), (again, resumed)):
        for step in range(3, 5):
            set_grads(net, step)
            opt.step()
    assert seen == ["pre", "post"] * 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"vectors": "sign"}, {"vectors": "l2", "embeddings": "row-l2"}])
def test_a_whole_model_learns_without_adam(options):
    model = Model(torch.float32)
    optimizer = build_optimizer(model, OptimConfig(lr=0.2, **options))
    ids = torch.arange(20).reshape(2, 10)
    losses = []
    for step in range(80):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / 80)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (3 * ids.flatten() + 1) % 20)
        loss.backward()
        before = snapshot(optimizer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 2.5 < losses[0]
    found = diagnose(model, optimizer, before)
    assert [row.name for row in found.matrices] == ["proj.weight"]  # rows and elements are no matrices to look at


def test_settings_reach_the_optimizer():
    config = OptimConfig(norm="schatten:4", vectors="l2", embeddings="row-l2", cap=2.0)
    optimizer = build_optimizer(Model(), config)
    assert {group["norm"] for group in optimizer.param_groups} == {"schatten:4"}
    assert {group["layout"] for group in optimizer.param_groups} == {"stack", "vector", "rows"}
    assert optimizer.cap == 2.0
    for wrong, message in [
        ({"norm": "spectral"}, r"optim\.norm: unknown norm"),
        ({"vectors": "signs"}, r"optim\.vectors.*did you mean 'sign'"),
        ({"embeddings": "l2"}, r"optim\.embeddings"),
        ({"cap": -1.0}, r"optim\.cap"),
        ({"momentum_start": 1.0}, r"optim\.momentum_start"),
        ({"momentum_warmup_fraction": 2.0}, r"optim\.momentum_warmup_fraction"),
    ]:
        with pytest.raises(ConfigError, match=message):
            OptimConfig(**wrong)
