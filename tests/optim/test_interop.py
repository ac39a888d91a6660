"""States of other Muons: torch's from the real thing, Keller's and Moonlight's from their own formulas."""

import copy
import io

import pytest
import torch
from torch import nn

from quintic.core import CheckpointError, ConfigError
from quintic.optim import Muon
from quintic.optim.interop import ForeignState, load_foreign_state

KELLER = (3.4445, -4.7750, 2.0315)
MATRICES = ("hidden.weight", "deep.weight")
REST = ("embed.weight", "hidden.bias", "deep.bias", "lm_head.weight", "lm_head.bias")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 9)
        self.deep = nn.Linear(9, 6)
        self.lm_head = nn.Linear(6, 11)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)


def set_grads(model, step, dtype=None):
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(dtype or p.dtype)


def run(model, optimizers, steps, start=1):
    for step in range(start, start + steps):
        set_grads(model, step)
        for optimizer in optimizers:
            optimizer.step()


def ours(model, **settings):
    return Muon(model, lr=1e-2, weight_decay=0.1, scale="keller", coefficients=KELLER, **settings)


def saved(state):
    """Through a file, as a user would."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def pick(model, names):
    return [dict(model.named_parameters())[name] for name in names]


def expected_model(steps=5):
    """Our optimizer on the same gradients all along: the weights, and itself."""
    model = Net()
    optimizer = ours(model)
    run(model, [optimizer], steps)
    return model, optimizer


def assert_continues_alike(load):
    """After loading, the next steps are those of an optimizer that was ours from the start."""
    model, optimizer = expected_model()
    other = copy.deepcopy(model)
    fresh = ours(other)
    load(fresh)
    run(model, [optimizer], 3, start=6)
    run(other, [fresh], 3, start=6)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("named", [True, False])
def test_torch_muon_with_adamw(named):
    old = Net()
    groups = [
        [(name, p) if named else p for name, p in zip(names, pick(old, names), strict=True)]
        for names in (MATRICES, REST)
    ]
    muon = torch.optim.Muon(groups[0], lr=1e-2)
    adamw = torch.optim.AdamW(groups[1], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    run(old, [muon, adamw], 5)
    states = saved(muon.state_dict()), saved(adamw.state_dict())

    def load(fresh):
        names = (None, None) if named else (MATRICES, REST)
        first = load_foreign_state(fresh, states[0], "torch", names=names[0])
        assert first.loaded == MATRICES
        assert set(first.fresh) == set(REST)
        second = load_foreign_state(fresh, states[1], "torch", names=names[1])
        assert second.loaded == REST
        assert set(second.fresh) == set(MATRICES)

    assert_continues_alike(load)


def test_torch_muon_buffers_are_equal_bit_by_bit_and_copied():
    old, new = Net(), Net()
    muon = torch.optim.Muon(pick(old, MATRICES), lr=1e-2)
    run(old, [muon], 3)
    optimizer = ours(new)
    state = muon.state_dict()
    load_foreign_state(optimizer, state, "torch", names=MATRICES)
    for i, (p, q) in enumerate(zip(pick(old, MATRICES), pick(new, MATRICES), strict=True)):
        buffer = optimizer.state[q]["momentum_buffer"]
        assert torch.equal(buffer, muon.state[p]["momentum_buffer"])
        buffer.zero_()
        assert state["state"][i]["momentum_buffer"].abs().sum() > 0


def average(grads, mu):
    buffer = torch.zeros_like(grads[0])
    for g in grads:
        buffer = mu * buffer + (1 - mu) * g
    return buffer


def gradients(model, name, steps=5):
    found = []
    for step in range(1, steps + 1):
        set_grads(model, step)
        found.append(dict(model.named_parameters())[name].grad.clone())
    return found


def moments(grads):
    return average(grads, 0.9), average([g.square() for g in grads], 0.95)


def keller_state(model, matrices=MATRICES):
    """state_dict of SingleDeviceMuonWithAuxAdam: Adam's group first, as in the example of its docstring."""
    state = {}
    for i, name in enumerate((*REST, *matrices)):
        grads = gradients(model, name)
        if name in matrices:
            state[i] = {"momentum_buffer": average(grads, 0.95)}
        else:
            first, second = moments(grads)
            state[i] = {"exp_avg": first, "exp_avg_sq": second, "step": 5}
    adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False}
    muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0, "use_muon": True}
    n = len(REST)
    groups = [{**adam, "params": list(range(n))}, {**muon, "params": list(range(n, n + len(matrices)))}]
    return {"state": state, "param_groups": groups}


def test_keller_with_auxiliary_adam():
    state = saved(keller_state(Net()))

    def load(fresh):
        found = load_foreign_state(fresh, state, "keller", names=[*REST, *MATRICES])
        assert found == ForeignState((*REST, *MATRICES), ())

    assert_continues_alike(load)


def test_keller_without_adam():
    """Its class Muon has three settings, and no moments."""
    buffers = {i: {"momentum_buffer": average(gradients(Net(), name), 0.95)} for i, name in enumerate(MATRICES)}
    state = {"state": buffers, "param_groups": [{"lr": 0.02, "weight_decay": 0, "momentum": 0.95, "params": [0, 1]}]}
    model = Net()
    optimizer = ours(model)
    assert load_foreign_state(optimizer, saved(state), "keller", names=MATRICES).loaded == MATRICES
    for i, p in enumerate(pick(model, MATRICES)):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffers[i]["momentum_buffer"])


def moonlight_state(model, mu=0.95):
    """state_dict of the toy Muon: one group, matrices first, the sum form, moments under its own names."""
    state = {}
    for i, name in enumerate((*MATRICES, *REST)):
        grads = gradients(model, name)
        if name in MATRICES:
            buffer = torch.zeros_like(grads[0])
            for g in grads:
                buffer = mu * buffer + g
            state[i] = {"use_muon": True, "momentum_buffer": buffer}
        else:
            first, second = moments(grads)
            state[i] = {"use_muon": False, "step": 5, "moment1": first, "moment2": second}
    group = {
        "lr": 1e-3,
        "wd": 0.1,
        "momentum": mu,
        "nesterov": True,
        "ns_steps": 5,
        "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
        "params": list(range(len(state))),
    }
    return {"state": state, "param_groups": [group]}


def test_moonlight():
    state = saved(moonlight_state(Net()))
    kept = copy.deepcopy(state)

    def load(fresh):
        load_foreign_state(fresh, state, "moonlight", names=[*MATRICES, *REST])

    assert_continues_alike(load)
    assert torch.equal(state["state"][0]["momentum_buffer"], kept["state"][0]["momentum_buffer"])


def test_moonlight_buffer_is_scaled_by_the_momentum_of_the_file():
    model = Net()
    optimizer = ours(model, momentum=0.5)
    state = moonlight_state(Net(), mu=0.8)
    load_foreign_state(optimizer, state, "moonlight", names=[*MATRICES, *REST])
    expected = average(gradients(Net(), "deep.weight"), 0.8)
    torch.testing.assert_close(optimizer.state[model.deep.weight]["momentum_buffer"], expected)


@pytest.mark.parametrize("source", ["torch", "moonlight"])
def test_a_sum_takes_over_sums_and_averages(source):
    model, mu = Net(), 0.8
    optimizer = ours(model, momentum_form="sum")
    if source == "moonlight":
        load_foreign_state(optimizer, moonlight_state(Net(), mu=mu), source, names=[*MATRICES, *REST])
        expected = average(gradients(Net(), "deep.weight"), mu) / (1 - mu)
    else:
        old = Net()
        theirs = torch.optim.Muon(pick(old, MATRICES), lr=1e-2, momentum=mu)
        run(old, [theirs], 2)
        load_foreign_state(optimizer, theirs.state_dict(), source, names=MATRICES)
        expected = theirs.state[old.deep.weight]["momentum_buffer"] / (1 - mu)
    torch.testing.assert_close(optimizer.state[model.deep.weight]["momentum_buffer"], expected)


def test_bare_tensors_are_matched_by_position():
    old, new = Net(), Net()
    muon = torch.optim.Muon(pick(old, MATRICES), lr=1e-2)
    run(old, [muon], 2)
    optimizer = Muon(pick(new, MATRICES), lr=1e-2)
    found = load_foreign_state(optimizer, muon.state_dict(), "torch")
    assert found.loaded == ("parameter 0", "parameter 1")
    assert torch.equal(
        optimizer.state[new.deep.weight]["momentum_buffer"], muon.state[old.deep.weight]["momentum_buffer"]
    )
    with pytest.raises(CheckpointError, match="2 parameters and this optimizer 1"):
        load_foreign_state(Muon([new.deep.weight], lr=1e-2), muon.state_dict(), "torch")


def test_half_precision_buffers_become_float32():
    old, new = Net().bfloat16(), Net().bfloat16()
    muon = torch.optim.Muon(pick(old, MATRICES), lr=1e-2)
    run(old, [muon], 2)
    optimizer = ours(new)
    load_foreign_state(optimizer, muon.state_dict(), "torch", names=MATRICES)
    buffer = optimizer.state[new.deep.weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer.bfloat16(), muon.state[old.deep.weight]["momentum_buffer"])
    run(new, [optimizer], 1)


def test_parameters_without_state_stay_fresh():
    old = Net()
    muon = torch.optim.Muon(pick(old, MATRICES), lr=1e-2)
    set_grads(old, 1)
    old.deep.weight.grad = None
    muon.step()
    new = Net()
    found = load_foreign_state(ours(new), muon.state_dict(), "torch", names=MATRICES)
    assert found.loaded == ("hidden.weight",)
    assert "deep.weight" in found.fresh


def reasons():
    """(change of a good Keller state and its names, what the message must say)."""
    good = [*REST, *MATRICES]

    def shape(state):
        state["state"][5]["momentum_buffer"] = torch.zeros(9, 7)

    def extra(state):
        state["state"][5]["second_momentum"] = torch.zeros(1)

    def settings(state):
        state["param_groups"][1] = {"params": [5, 6], "lr": 1.0, "rho": 0.9}

    def empty(state):
        del state["param_groups"]

    return [
        (shape, good, r"momentum_buffer of hidden\.weight has shape \(9, 7\) in the state and \(9, 6\) here"),
        (extra, good, r"the state of hidden\.weight has momentum_buffer, second_momentum"),
        (settings, good, "group 1 does not look like one of 'keller': its settings are lr, rho"),
        (empty, good, "it has no param_groups"),
        (None, None, "pass names="),
        (None, good[:-1], "6 names for the 7 parameters"),
        (None, [*good[:-1], good[0]], "'embed.weight' occurs twice"),
        (None, [*good[:-1], "deep.wait"], "'deep.wait' that this optimizer lacks; did you mean 'deep.weight'"),
        (None, [good[5], *good[1:5], good[0], good[6]], r"hidden\.weight was under adamw .* and is under muon here"),
        (None, [*good[:5], good[6], good[5]], r"momentum_buffer of deep\.weight has shape \(9, 6\)"),
    ]


@pytest.mark.parametrize(("spoil", "names", "message"), reasons())
def test_a_mismatch_names_the_parameter_and_changes_nothing(spoil, names, message):
    state = keller_state(Net())
    if spoil:
        spoil(state)
    model = Net()
    optimizer = ours(model)
    run(model, [optimizer], 1)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_foreign_state(optimizer, state, "keller", names=names)
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, kept["state"][key][name])


@pytest.mark.parametrize(
    ("state", "right"), [(keller_state(Net()), "keller"), (moonlight_state(Net()), "moonlight"), (None, "torch")]
)
def test_a_wrong_source_is_noticed(state, right):
    if state is None:
        state = torch.optim.Muon(pick(Net(), MATRICES)).state_dict()
    for source in {"torch", "keller", "moonlight"} - {right}:
        with pytest.raises(CheckpointError, match=f"does not look like one of '{source}'"):
            load_foreign_state(ours(Net()), state, source, names=[])


def test_an_unknown_source():
    with pytest.raises(ConfigError, match="did you mean 'keller'"):
        load_foreign_state(ours(Net()), {}, "kellr")


def test_state_of_sgd_is_not_taken_for_kellers():
    sgd = torch.optim.SGD(pick(Net(), MATRICES), lr=0.1, momentum=0.9)
    with pytest.raises(CheckpointError, match="does not look like"):
        load_foreign_state(ours(Net()), sgd.state_dict(), "keller", names=MATRICES)
