"""The AdamW half against torch.optim.AdamW, and what both halves share."""

import pytest
import torch
from tests.optim.toy import Model, parameters, randn, run
from torch import nn

from quintic.optim import Muon


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("maximize", "eps"), [(False, 1e-8), (True, 1e-2)])
def test_adamw_half_is_torch_adamw(dtype, maximize, eps):
    shapes = [(7,), (5, 3), (), (4, 3, 2)]
    ours, fused, plain = (parameters(*shapes, dtype=dtype) for _ in range(3))
    keywords = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": eps, "weight_decay": 0.1, "maximize": maximize}
    optimizers = (
        Muon([{"params": ours, "algorithm": "adamw"}], lr=3e-3, weight_decay=0.1, maximize=maximize, adamw_eps=eps),
        torch.optim.AdamW(fused, fused=True, **keywords),
        torch.optim.AdamW(plain, foreach=False, **keywords),
    )
    for params, optimizer in zip((ours, fused, plain), optimizers, strict=True):
        run(params, optimizer, 20)
    for a, b, c in zip(ours, fused, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-6 if dtype == torch.float32 else 1e-12, rtol=1e-6)


def test_adamw_half_keeps_other_strides_right():
    """The fused kernel walks memory in order and would pair the wrong elements."""
    values = randn(6, 4)
    plain = nn.Parameter(values.clone())
    strided = [
        nn.Parameter(values.T.contiguous().T),
        nn.Parameter(values.repeat_interleave(2, 1)[:, ::2]),
        nn.Parameter(values.clone()),
    ]
    for step in range(3):
        g = randn(6, 4, seed=step + 1)
        plain.grad = g.clone()
        for p, grad in zip(strided, (g, g, g.T.contiguous().T), strict=True):
            p.grad = grad.clone() if p is not strided[2] else grad
        if step == 0:
            a = Muon([{"params": [plain], "algorithm": "adamw"}])
            b = Muon([{"params": strided, "algorithm": "adamw"}])
        a.step()
        b.step()
    for p in strided:
        assert torch.equal(p, plain)


def test_both_halves_share_rate_and_decay():
    model = Model()
    optimizer = Muon(model, lr=0.125, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():  # gains decay too: Moonlight, appendix D
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.0625))
