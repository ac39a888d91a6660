"""Spectral weight decay within Muon: against a plain reference, in stacks and blocks, through checkpoints."""

import copy
import io

import pytest
import torch
from tests.optim.toy import parameters, randn, run
from torch import nn

import quintic.optim.matrices as matrices_module
from quintic.core import CheckpointError, ConfigError
from quintic.optim import Muon, OptimConfig, build_optimizer
from quintic.optim.decay import follow_top_space

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def spectral(params, **settings):
    return Muon(params, **{"lr": 0.05, "weight_decay": 0.4, "decay": "spectral", **settings})


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_step_is_that_without_decay_plus_the_decay_of_the_top(shape, rank):
    """Constant zero gradients after the first leave the decay alone visible; the SVD in place of the iterations."""
    (p,) = parameters(shape, dtype=torch.float64)
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(p, full_matrices=False)
        p.copy_(U @ torch.diag(4.0 ** -torch.arange(5.0, dtype=torch.float64)) @ Vh)
    before = p.detach().clone()
    (twin,) = parameters(shape, dtype=torch.float64)
    twin.data.copy_(before)
    run([p], spectral([p], decay_rank=rank), 1)
    run([twin], Muon([twin], lr=0.05, weight_decay=0.0), 1)
    top = (U[:, :rank] * 4.0 ** -torch.arange(float(rank), dtype=torch.float64)) @ Vh[:rank]
    torch.testing.assert_close(p.detach(), twin.detach() - 0.05 * 0.4 * top, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("cap", [None, 2 * 8 * 6 * 8])
def test_stacks_and_row_blocks_equal_separate_matrices(monkeypatch, cap):
    stack, blocks, plain = parameters((5, 8, 6), (16, 6), (8, 6), dtype=torch.float64)
    everything = [stack, blocks, plain]
    singles = [nn.Parameter(part.clone()) for part in [*stack.detach(), *blocks.detach().chunk(2), plain.detach()]]
    a = spectral([{"params": [stack, plain]}, {"params": [blocks], "split": {"blocks": 2}}])
    b = spectral(singles)
    if cap is not None:
        monkeypatch.setattr(matrices_module, "_STACK_BYTES", cap)
    for step in range(4):
        for i, p in enumerate(everything):
            p.grad = randn(*p.shape, seed=10 * step + i, dtype=torch.float64)
        parts = [*stack.grad, *blocks.grad.chunk(2), plain.grad]
        for single, g in zip(singles, parts, strict=True):
            single.grad = g.clone()
        a.step()
        b.step()
    merged = [*stack.detach(), *blocks.detach().chunk(2), plain.detach()]
    for part, single in zip(merged, singles, strict=True):
        torch.testing.assert_close(part, single.detach(), atol=1e-10, rtol=1e-10)
    assert a.state[stack]["top_space"].shape == (5, 6, 1)
    assert a.state[blocks]["top_space"].shape == (2, 6, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2])
def test_resume_is_bit_exact(dtype, rank):
    shapes = [(8, 6), (3, 4, 7), (6, 8)]
    params = parameters(*shapes, dtype=dtype)
    optimizer = spectral(params, decay_rank=rank)
    run(params, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = spectral(resumed, decay_rank=rank)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin_params, twin = copy.deepcopy((params, optimizer))
    for some, one in ((params, optimizer), (resumed, other), (twin_params, twin)):
        run(some, one, 3, start=3)
    for p, q, r in zip(params, resumed, twin_params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert torch.equal(optimizer.state[p]["top_space"], other.state[q]["top_space"])
        assert other.state[q]["top_space"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_states_of_another_shape_are_refused_and_older_ones_load():
    (p,), (q,) = parameters((8, 6)), parameters((8, 6))
    a, b = spectral([p]), spectral([q])
    run([p], a, 1)
    state = copy.deepcopy(a.state_dict())
    state["state"][0]["top_space"] = torch.zeros(2, 6, 1)
    with pytest.raises(CheckpointError, match=r"top_space .* \(2, 6, 1\) .* \(1, 6, 1\)"):
        b.load_state_dict(state)

    older = Muon([p])
    run([p], older, 1)
    state = copy.deepcopy(older.state_dict())
    del state["param_groups"][0]["decay"], state["param_groups"][0]["decay_rank"]
    b.load_state_dict(state)
    assert b.param_groups[0]["decay"] == "spectral"  # a setting younger than the state keeps its value


def test_a_changed_rank_starts_new_vectors():
    (p,) = parameters((8, 6))
    optimizer = spectral([p])
    run([p], optimizer, 1)
    optimizer.param_groups[0]["decay_rank"] = 3
    run([p], optimizer, 1, start=1)
    assert optimizer.state[p]["top_space"].shape == (1, 6, 3)


def test_without_gradient_or_with_a_bad_one_nothing_moves():
    params = parameters((8, 6), (8, 6))
    optimizer = spectral(params)
    run(params, optimizer, 1)
    weights = [p.detach().clone() for p in params]
    vectors = [optimizer.state[p]["top_space"].clone() for p in params]
    params[0].grad, params[1].grad = None, torch.full((8, 6), torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    params[1].grad = None
    optimizer.step()
    for p, w, v in zip(params, weights, vectors, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(optimizer.state[p]["top_space"], v)


def test_no_decay_keeps_no_vectors_and_the_rest_decays_as_ever():
    matrix, gain = parameters((8, 6), (6,))
    groups = [{"params": [matrix], "weight_decay": 0.0}, {"params": [gain], "algorithm": "adamw"}]
    optimizer = spectral(groups)
    before = gain.detach().clone()
    matrix.grad, gain.grad = torch.zeros(8, 6), torch.zeros(6)
    optimizer.step()
    assert "top_space" not in optimizer.state[matrix]
    torch.testing.assert_close(gain.detach(), before * (1 - 0.05 * 0.4))


def test_the_norm_bound_holds_for_frobenius_decay_and_not_for_spectral():
    """||W|| <= max(||W_0||, s / lambda) needs the factor 1 - lr lambda on every singular value."""
    bound, direction = 2.0, torch.linalg.qr(randn(12, 12)).Q
    norms = {}
    for decay in ("frobenius", "spectral"):
        p = nn.Parameter(0.1 * randn(12, 12, seed=1))
        optimizer = Muon([p], lr=0.1, weight_decay=1 / bound, decay=decay, scale="none", method="svd", momentum=0.0)
        worst = 0.0
        for _ in range(400):
            p.grad = direction.clone()
            optimizer.step()
            worst = max(worst, torch.linalg.matrix_norm(p.detach(), 2).item())
        norms[decay] = worst
    assert norms["frobenius"] <= bound * (1 + 1e-4)
    assert norms["spectral"] > 2 * bound


def test_half_precision_follows_float32():
    (p,), (q,) = parameters((16, 12)), parameters((16, 12))
    half = nn.Parameter(q.detach().bfloat16())
    p.data.copy_(half.float())
    a, b = spectral([p]), spectral([half])
    for step in range(3):
        half.grad = randn(16, 12, seed=step).bfloat16()
        p.grad = half.grad.float()
        a.step()
        b.step()
    torch.testing.assert_close(half.float(), p.detach(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(a.state[p]["top_space"].abs(), b.state[half]["top_space"].abs(), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"decay": "spectrl"}, "did you mean 'spectral'"),
        ({"decay_rank": 0}, "decay_rank = 0"),
        ({"decay_rank": True}, "decay_rank = True"),
        ({"decay_rank": 1.0}, "decay_rank = 1.0"),
    ],
)
def test_wrong_settings_are_refused(keywords, message):
    with pytest.raises(ConfigError, match=message):
        Muon(parameters((4, 4)), **keywords)
    with pytest.raises(ConfigError, match=next(iter(keywords))):
        OptimConfig(**keywords)


def test_settings_reach_the_optimizer():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    optimizer = build_optimizer(model, OptimConfig(decay="spectral", decay_rank=2))
    assert {(g["decay"], g["decay_rank"]) for g in optimizer.param_groups} == {("spectral", 2)}


def test_the_vectors_in_the_state_move_by_one_iteration_a_step():
    (p,) = parameters((8, 6))
    optimizer = spectral([p])
    run([p], optimizer, 1)
    weights, vectors = p.detach().clone()[None], optimizer.state[p]["top_space"].clone()
    run([p], optimizer, 1, start=1)
    torch.testing.assert_close(optimizer.state[p]["top_space"], follow_top_space(weights, vectors))
    assert not torch.equal(optimizer.state[p]["top_space"], vectors)
