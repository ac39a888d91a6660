"""Groups of a model: what they say they are, rates and decays of their own, and states with other groups."""

import copy
import pickle
import warnings

import pytest
import torch
from tests.optim.toy import Model, parameters, run, snapshot
from torch import nn

from quintic.core import CheckpointError, ConfigError
from quintic.core.roles import Role, declare
from quintic.optim import Muon, convert_lr, param_groups, roles


def rates(optimizer):
    return {group["role"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}


def test_every_role_has_a_group_that_says_so():
    model = Model()
    table = roles(model)
    for groups in (param_groups(model), Muon(model).param_groups):
        assert [group["role"] for group in groups] == [
            "embedding", "matrix", "expert stack", "router", "vector", "head",
        ]  # fmt: skip
        for group in groups:
            names = group.get("param_names") or [name for name, _ in group["params"]]
            assert names == [row.name for row in table if row.role is Role(group["role"])]
            assert {table[name].algorithm for name in names} == {group["algorithm"]}


def test_groups_of_a_model_are_those_that_muon_makes():
    """Splits and layouts included: the weights are the same bits."""
    models = [nn.ModuleDict({"a": Model(), "conv": nn.Conv2d(4, 4, 3), "b": nn.MultiheadAttention(6, 2)}) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        declare(model, "conv.weight", "vector")
        declare(model, "b.out_proj.weight", "head")
    options = {"vectors": "sign", "embeddings": "row-l2", "strict": True}
    optimizers = Muon(models[0], lr=0.1, **options), Muon(param_groups(models[1], **options), lr=0.1)
    for model, optimizer in zip(models, optimizers, strict=True):
        run(list(model.parameters()), optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
    with pytest.raises(ConfigError, match="did you mean 'sign'"):
        param_groups(models[0], vectors="sing")


def test_assumptions_are_told_to_the_line_that_asks_for_groups():
    with pytest.warns(UserWarning, match=r"assumed: 0\.weight\. Say") as caught:
        param_groups(nn.Sequential(nn.Linear(3, 4)))
    assert caught[0].filename == __file__


def test_a_group_that_was_changed_goes_its_own_way():
    """Embeddings at ten times the rate and gains without decay: each parameter is as if it were alone."""
    model = Model()
    groups = param_groups(model)
    for group in groups:
        if group["role"] == "embedding":
            group["lr"] = 0.1
        if group["role"] == "vector":
            group["weight_decay"] = 0.0
    alone = copy.deepcopy(dict(model.named_parameters()))
    each = {
        name: Muon([{"params": [p], "algorithm": row.algorithm}], lr=lr, weight_decay=wd)
        for (name, p), row in zip(alone.items(), roles(model), strict=True)
        for lr, wd in [(0.1 if name == "embed" else 0.01, 0.0 if name == "gain" else 0.5)]
    }
    optimizer = Muon(groups, lr=0.01, weight_decay=0.5)
    for step in range(3):
        run(list(model.parameters()), optimizer, 1, start=step)
        for (name, p), q in zip(alone.items(), model.parameters(), strict=True):
            p.grad = q.grad
            each[name].step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, alone[name], msg=name)


def test_adamw_has_a_rate_and_a_decay_of_its_own_if_given():
    halves = dict.fromkeys(("matrix", "expert stack", "router"), (0.02, 0.1))
    adamw = ("embedding", "vector", "head")
    model = Model()
    assert rates(Muon(model, lr=0.02)) == halves | dict.fromkeys(adamw, (0.02, 0.1))
    own = Muon(model, lr=0.02, scale="keller", adamw_lr=0.003, adamw_weight_decay=0.0)
    assert rates(own) == halves | dict.fromkeys(adamw, (0.003, 0.0))
    # The same as groups by hand, on the same gradients.
    other = copy.deepcopy(model)
    groups = [{**group, "lr": 0.003, "weight_decay": 0.0} if group["algorithm"] == "adamw" else group
              for group in param_groups(other)]  # fmt: skip
    run(list(model.parameters()), own, 2)
    run(list(other.parameters()), Muon(groups, lr=0.02, scale="keller"), 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_rate_of_adamw_is_of_groups_by_hand_and_added_later_too_but_theirs_wins():
    a, b, c, d = parameters((3, 3), (4,), (5,), (6,))
    optimizer = Muon([{"params": [a]}, {"params": [b], "algorithm": "adamw"}], lr=0.02, adamw_lr=0.001)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optimizer):
        twin.add_param_group({"params": [c.clone().detach()], "algorithm": "adamw"})
        twin.add_param_group({"params": [d.clone().detach()], "algorithm": "adamw", "lr": 0.5})
        assert [group["lr"] for group in twin.param_groups] == [0.02, 0.001, 0.001, 0.5]
    tensor = Muon(Model(), lr=torch.tensor(0.02), adamw_lr=torch.tensor(0.001))
    assert {float(lr) for lr, _ in rates(tensor).values()} == {float(torch.tensor(lr)) for lr in (0.02, 0.001)}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"adamw_lr": -1.0}, "lr = -1.0; expected a finite number"),
        ({"adamw_lr": "1e-3"}, "lr = '1e-3'; expected a number"),
        ({"adamw_weight_decay": float("nan")}, "weight_decay = nan"),
    ],
)
def test_wrong_values_of_adamw_are_refused(keywords, message):
    with pytest.raises(ConfigError, match=message):
        Muon(Model(), **keywords)


@pytest.mark.parametrize("name", ["adamw_lr", "adamw_weight_decay"])
def test_settings_of_the_constructor_are_no_settings_of_a_group(name):
    with pytest.raises(ConfigError, match=rf"a group has '{name}'.*beside algorithm='adamw'"):
        Muon([{"params": parameters((3, 3)), name: 0.1}])


def test_schedulers_keep_the_ratio_of_the_rates():
    optimizer = Muon(Model(), lr=0.02, adamw_lr=0.004)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert {lr for lr, _ in rates(optimizer).values()} == {0.005, 0.001}


@pytest.mark.parametrize("keywords", [{"adjust_lr_fn": "original"}, {"scale": "mup"}, {"scale": "none"}])
def test_a_rate_of_muon_that_adamw_shares_is_warned_of(keywords):
    """The reverse of Adam's rate under a scale of order 1; only a rate of its own helps."""
    with pytest.warns(UserWarning, match=r"lr = 0\.02 with scale='\w+' is the rate of AdamW's half") as caught:
        Muon(Model(), lr=0.02, weight_decay=0.01, **keywords)
    assert len(caught) == 1 and caught[0].filename == __file__
    advised = convert_lr(0.02, 0.01, "keller", "moonlight", 1024)
    assert f"width 1024: {advised.lr:.3g} and {advised.weight_decay:.3g}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon(Model(), lr=0.02, adamw_lr=0.003, **keywords)
        Muon(Model(), lr=0.02, adamw_lr=0.02, **keywords)  # somebody who means it
        Muon(parameters((3, 3)), lr=0.02, **keywords)
        Muon(Model(), lr=0.02)
        Muon([{**g, "lr": 0.003} if g["algorithm"] == "adamw" else g for g in param_groups(Model())],
             lr=0.02, **keywords)  # fmt: skip


def as_it_was(state):
    """A state dict as versions wrote it that had one group for all roles that are updated in one way."""
    merged = {}
    for group in state["param_groups"]:
        way = tuple(str(group[name]) for name in ("algorithm", "layout", "split", "orientation"))
        into = merged.setdefault(way, {**group, "params": [], "param_names": []})
        into["params"] += group["params"]
        into["param_names"] += group["param_names"]
        into.pop("role", None)
    return {"state": state["state"], "param_groups": list(merged.values())}


def test_a_state_of_before_there_was_a_group_for_each_role_loads():
    model, other = Model(), Model()
    optimizer = Muon(model, lr=0.02)
    run(list(model.parameters()), optimizer, 2)
    other.load_state_dict(model.state_dict())
    old = as_it_was(copy.deepcopy(optimizer.state_dict()))
    assert [len(group["params"]) for group in old["param_groups"]] == [3, 4]
    old["param_groups"][0]["lr"] = 0.004
    again = Muon(other, lr=1.0)
    again.load_state_dict(old)
    assert [group["role"] for group in again.param_groups] == [group["role"] for group in optimizer.param_groups]
    assert rates(again)["router"][0] == 0.02 and rates(again)["head"][0] == rates(again)["vector"][0] == 0.004
    for group in optimizer.param_groups:
        if group["algorithm"] == "adamw":
            group["lr"] = 0.004
    run(list(model.parameters()), optimizer, 2, start=2)
    run(list(other.parameters()), again, 2, start=2)
    assert all(torch.equal(p, q) for p, q in zip(snapshot(model.parameters()), other.parameters(), strict=True))


def test_a_state_whose_groups_do_not_contain_ours_is_left_to_torch():
    optimizer = Muon(Model())
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(as_it_was(optimizer.state_dict()) | {"param_groups": []})
    fewer = as_it_was(optimizer.state_dict())
    fewer["param_groups"][0]["params"].pop()
    fewer["param_groups"][0]["param_names"].pop()
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(fewer)
    with pytest.raises(ValueError, match="group"):  # two rates would become one
        Muon([{"params": list(Model().named_parameters()), "algorithm": "adamw"}]).load_state_dict(
            optimizer.state_dict()
        )
    with pytest.raises(CheckpointError, match="not a state of quintic's Muon"):
        optimizer.load_state_dict(torch.optim.Adam(Model().parameters()).state_dict())
