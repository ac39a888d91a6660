"""Being a torch optimizer: state, copies, closures, hooks, schedulers, groups."""

import copy
import io
import pickle

import pytest
import torch
from tests.optim.toy import Model, parameters, randn, run, snapshot
from torch import nn

from quintic.core import CheckpointError
from quintic.optim import Muon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", ["dict", "file", "pickle", "deepcopy"])
def test_resume_is_bit_exact(through, dtype):
    straight = Model(dtype)
    optimizer = Muon(straight, lr=0.05)
    run(list(straight.parameters()), optimizer, 3)
    if through == "deepcopy":
        model, resumed = copy.deepcopy((straight, optimizer))
    else:
        model = Model(dtype)
        model.load_state_dict(straight.state_dict())
        resumed = Muon(model, lr=0.99, weight_decay=0.7)  # overwritten by the state dict
        state = optimizer.state_dict()
        if through == "pickle":
            state = pickle.loads(pickle.dumps(state))
        elif through == "file":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(state)
    run(list(straight.parameters()), optimizer, 3, start=3)
    run(list(model.parameters()), resumed, 3, start=3)
    for p, q in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state[p].items())


@pytest.mark.parametrize("decay", ["frobenius", "spectral"])
@pytest.mark.parametrize("there", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("here", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_moves_to_a_model_of_another_dtype(here, there, decay):
    straight, moved = Model(here), Model(there)
    optimizer, resumed = Muon(straight, lr=0.05, decay=decay), Muon(moved, decay=decay)
    run(list(straight.parameters()), optimizer, 3)
    moved.load_state_dict(straight.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    run(list(straight.parameters()), optimizer, 3, start=3)
    run(list(moved.parameters()), resumed, 3, start=3)
    wide = torch.float64 if there == torch.float64 else torch.float32
    coarse = torch.bfloat16 in (here, there)
    for p, q in zip(straight.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), atol=1e-2 if coarse else 1e-5, rtol=1e-2 if coarse else 1e-5)
        assert {v.dtype for k, v in resumed.state[q].items() if k != "step"} == {wide}


def test_foreign_states_are_refused():
    (p,) = parameters((4, 6))
    optimizer = Muon([("w", p)])
    run([p], optimizer, 1)
    with pytest.raises(CheckpointError, match=r"not a state of quintic's Muon.*scale"):
        optimizer.load_state_dict(torch.optim.Muon([p]).state_dict())
    other = Muon([("w", nn.Parameter(torch.zeros(6, 4)))])
    with pytest.raises(CheckpointError, match=r"momentum_buffer of 'w' has shape \(4, 6\)"):
        other.load_state_dict(optimizer.state_dict())
    adamw = Muon([{"params": [("w", p)], "algorithm": "adamw"}])
    state = {**optimizer.state_dict(), "param_groups": adamw.state_dict()["param_groups"]}  # as a checkpoint is loaded
    with pytest.raises(CheckpointError, match="'w' is updated by adamw here and has momentum_buffer in the state"):
        adamw.load_state_dict(state)
    with pytest.raises(ValueError, match="group"):
        Muon(parameters((4, 6), (4, 6))).load_state_dict(optimizer.state_dict())


def test_a_loaded_state_is_a_copy():
    a, b = parameters((4, 6)), parameters((4, 6))
    x, y = Muon(a), Muon(b)
    run(a, x, 1)
    y.load_state_dict(x.state_dict())
    kept = x.state[a[0]]["momentum_buffer"].clone()
    run(b, y, 1)
    assert torch.equal(x.state[a[0]]["momentum_buffer"], kept)


def test_pickle_keeps_the_table_and_the_count():
    optimizer = Muon(Model())
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.roles == optimizer.roles
    assert again.skipped_steps == 0
    run([p for g in again.param_groups for p in g["params"]], again, 1)


def test_names_are_in_the_state_dict():
    model = Model()
    groups = Muon(model).state_dict()["param_groups"]
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(n for n, _ in model.named_parameters())
    named = Muon([("w", nn.Parameter(randn(3, 4)))])
    assert named.state_dict()["param_groups"][0]["param_names"] == ["w"]


def test_closure_hooks_and_schedulers():
    (p,) = parameters((4, 6))
    optimizer = Muon([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().square().sum()
    loss = optimizer.step(closure)
    assert loss == before and loss.requires_grad  # as it is: no number of it
    assert seen == ["pre", "post"]
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    momenta = set()
    for _ in range(9):
        optimizer.step(closure)
        one_cycle.step()
        momenta.add(optimizer.param_groups[0]["momentum"])
    assert len(momenta) > 2
    assert p.square().sum() < before


def test_the_rate_may_be_a_tensor_and_is_read_at_each_step():
    for lr in (torch.tensor(0.05), torch.tensor([0.05])):
        a, b = Model(), Model()
        x, y = Muon(a, lr=lr), Muon(b, lr=0.05)
        run(list(a.parameters()), x, 1)
        run(list(b.parameters()), y, 1)
        lr.fill_(0.01)
        for g in y.param_groups:
            g["lr"] = 0.01
        run(list(a.parameters()), x, 1, start=1)
        run(list(b.parameters()), y, 1, start=1)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_lr_zero_leaves_weights():
    model = Model()
    before = snapshot(model.parameters())
    run(list(model.parameters()), Muon(model, lr=0.0), 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_grad_scaler_with_an_overflow_leaves_the_momentum():
    (p,) = parameters((4, 6))
    optimizer = Muon([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * randn(4, 6, seed=1)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    kept, weights = optimizer.state[p]["momentum_buffer"].clone(), p.detach().clone()
    p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], kept)
    assert torch.equal(p, weights)


def test_no_value_is_read_from_the_device_during_a_step():
    """Tensors of the meta device have no values, so reading one raises."""
    model = Model().to("meta")
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError):
        assert optimizer.skipped_steps


def test_add_param_group():
    a, b, c = parameters((4, 6), (5, 5), (7,))
    optimizer = Muon([a], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.3, "scale": "mup"})
    optimizer.add_param_group({"params": [c], "algorithm": "adamw"})
    run([a, b, c], optimizer, 2)
    assert {"momentum_buffer"} == optimizer.state[b].keys()
    assert {"step", "exp_avg", "exp_avg_sq"} == optimizer.state[c].keys()


@pytest.mark.parametrize("tensor", [False, True])
def test_every_scheduler_moves_the_rate(tensor):
    schedulers = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    }
    for name, make in schedulers.items():
        model = Model()
        optimizer = Muon(model, lr=torch.tensor(0.1) if tensor else 0.1, weight_decay=0.0)
        scheduler = make(optimizer)
        lengths = []
        for _ in range(3):
            before = snapshot(model.parameters())
            run(list(model.parameters()), optimizer, 1)
            lengths.append((model.proj.detach() - before[1]).norm().item())
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
        assert lengths[2] < 0.8 * lengths[0], name
        assert len({float(group["lr"]) for group in optimizer.param_groups}) == 1


def test_a_state_loads_again_and_again():
    """torch adds a setting of its own when a state is loaded; the next load must not miss it."""
    a, b = parameters((4, 6)), parameters((4, 6))
    x, y = Muon(a), Muon(b)
    run(a, x, 1)
    state = copy.deepcopy(x.state_dict())
    for _ in range(2):
        y.load_state_dict(copy.deepcopy(state))
    assert torch.equal(x.state[a[0]]["momentum_buffer"], y.state[b[0]]["momentum_buffer"])


def test_a_copy_keeps_its_counts_and_settings():
    (p,) = parameters((4, 6))
    optimizer = Muon([p], cap=1e-3, nonfinite="skip", distributed="gather")
    run([p], optimizer, 1)
    p.grad = torch.full_like(p, float("inf"))
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.skipped_steps, twin.cap, twin.nonfinite, twin.distributed) == (1, 1e-3, "skip", "gather")
        assert twin.cap_factor == optimizer.cap_factor
        run(twin.param_groups[0]["params"], twin, 1)
        assert optimizer.skipped_steps == 1


def test_settings_younger_than_a_state_keep_their_values():
    (p,) = parameters((4, 6))
    old = Muon([p])
    run([p], old, 1)
    state = copy.deepcopy(old.state_dict())
    for name in ("split", "orientation", "norm", "decay"):
        del state["param_groups"][0][name]
    (q,) = parameters((4, 6))
    new = Muon([{"params": [q], "split": {"blocks": 2}}], norm="schatten:4")
    new.load_state_dict(state)
    assert new.param_groups[0]["split"] == {"blocks": 2} and new.param_groups[0]["norm"] == "schatten:4"
    run([q], new, 1)


def test_a_step_is_labelled_in_profiles_and_seen_by_autograd():
    model = Model()
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    matrices = [model.proj, model.square, model.experts, model.router]
    versions = [p._version for p in matrices]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert any(event.key == "Optimizer.step#Muon.step" for event in profile.key_averages())
    # A changed parameter that was saved for backward must be noticed (torch's fused AdamW keeps silent).
    assert all(p._version > old for p, old in zip(matrices, versions, strict=True))


def test_the_number_of_threads_changes_rounding_only():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            params = parameters((64, 64), (4, 32, 48), dtype=torch.float64)
            run(params, Muon(params, lr=0.05), 3)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, atol=1e-11, rtol=1e-11)
