"""The optimizer lies where the parameters do, whatever the default device, and asks no device for what it has not."""

import pytest
import torch
from tests.devices import NARROW, meta_by_default, without_float64
from tests.optim.toy import Model, randn
from torch import nn

from quintic.optim import GradientClipping, Muon
from quintic.optim.diagnostics import diagnose, snapshot
from quintic.optim.interop import load_foreign_state
from quintic.optim.measures import wide
from quintic.optim.norms import global_norm
from quintic.optim.qk_clip import clip_qk_, max_logits


def trained(**settings):
    """Weights after two steps, the optimizer replaced by one that takes its state over, and what was measured."""
    with torch.device("cpu"):
        model = Model()
        gradients = [[randn(*p.shape, seed=10 * step + i) for i, p in enumerate(model.parameters())] for step in (0, 1)]
    found = [float(global_norm([]))]
    clipping = [GradientClipping(kind, 0.5) for kind in ("global", "spectral", "adaptive")]
    state = Muon(model, lr=0.01, **settings).state_dict()
    for step in gradients:
        for p, gradient in zip(model.parameters(), step, strict=True):
            p.grad = gradient
        for clip in clipping:
            clip(model)
            clip.load_state_dict(clip.state_dict())
        optimizer = Muon(model, lr=0.01, **settings)
        optimizer.load_state_dict(state)
        before = snapshot(optimizer)
        optimizer.step()
        found += diagnose(model, optimizer, before).metrics.values()
        state = optimizer.state_dict()
    return [p.detach() for p in model.parameters()], found + [clip.norms for clip in clipping]


@pytest.mark.parametrize(
    "settings", [{"cap": 1e-3}, {"decay": "spectral"}, {"vectors": "sign", "embeddings": "row-l2"}]
)
def test_steps_are_the_same_with_another_default_device(settings):
    weights, found = trained(**settings)
    with meta_by_default():
        there, found_there = trained(**settings)
    assert all(torch.equal(*pair) for pair in zip(weights, there, strict=True))
    assert found == found_there


def test_a_foreign_state_is_taken_over_with_another_default_device():
    p = nn.Parameter(randn(4, 3))
    p.grad = randn(4, 3, seed=1)
    old = torch.optim.Muon([p])
    old.step()
    with meta_by_default():
        new = Muon([("w", p)])
        load_foreign_state(new, old.state_dict(), "torch", names=["w"])
    assert torch.allclose(new.state[p]["momentum_buffer"], old.state[p]["momentum_buffer"])


def test_heads_are_clipped_with_another_default_device():
    query, key = randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1)
    with meta_by_default():
        largest = max_logits(query, key)
        assert clip_qk_(query[0], key[0], largest, tau=1e-3).device.type == "cpu"


def test_no_float64_is_asked_of_a_device_that_has_none(monkeypatch):
    reached = []
    with without_float64(monkeypatch):
        with NARROW:
            first, second, bias = (nn.Parameter(torch.ones(shape)) for shape in ((8, 4), (4, 8), (8,)))
            largest = torch.ones(2)
            for p in (first, second, bias):
                p.grad = torch.ones_like(p)
        optimizer = Muon([first, second], cap=1.0)
        reached.append(global_norm([torch.ones_like(p) for p in (first, second, bias)]).dtype)
        for kind in ("global", "spectral", "adaptive"):
            GradientClipping(kind)([first, second, bias])
        reached.append(optimizer.cap_factor.dtype)
        optimizer.step()
        clip_qk_(first.detach().view(2, 4, 4), second.detach().view(2, 2, 8), largest)
        reached.append(wide(first).dtype)
    assert reached == [torch.float32, torch.float32, torch.float64]
