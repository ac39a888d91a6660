"""Roles stay with the module through copies, casts, meta construction and parameter replacement; names are checked."""

import copy

import pytest
import torch
from torch import nn

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.core.roles import Constant, Normal, ParameterRole, Role, declare, declared_roles


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 3))
        self.gain = nn.Parameter(torch.empty(3))
        self.extra = nn.Parameter(torch.empty(1))
        declare(self, "gain", Role.VECTOR, Constant(1.0))
        declare(self, "weight", Role.MATRIX, Normal(0.02))


EXPECTED = {
    "0.weight": ParameterRole(Role.MATRIX, Normal(0.02)),
    "0.gain": ParameterRole(Role.VECTOR, Constant(1.0)),
}


def test_roles_in_parameter_order_and_undeclared_left_out():
    assert list(declared_roles(nn.Sequential(Leaf())).items()) == list(EXPECTED.items())


def test_roles_survive():
    model = nn.Sequential(Leaf())
    assert declared_roles(copy.deepcopy(model).to(torch.float64)) == EXPECTED
    with torch.device("meta"):
        assert declared_roles(nn.Sequential(Leaf())) == EXPECTED
    model[0].weight = nn.Parameter(torch.zeros(1, 3))
    assert declared_roles(model) == EXPECTED


def vit():
    """A model that declares nothing, with names as other people give them."""
    block = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)]), "fc": nn.Linear(4, 3)})
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    return model


def test_somebody_elses_model_is_declared_by_qualified_names_and_patterns():
    model = vit()
    declare(model, "fc.weight", "head")
    declare(model, "blocks.*.qkv.weight", Role.MATRIX, split={"blocks": 3})
    declare(model, "*_token", "embedding")
    qkv = ParameterRole(Role.MATRIX, None, {"blocks": 3})
    expected = {
        "cls_token": ParameterRole(Role.EMBEDDING),
        "blocks.0.qkv.weight": qkv,
        "blocks.1.qkv.weight": qkv,
        "fc.weight": ParameterRole(Role.HEAD),
    }
    assert list(declared_roles(model).items()) == list(expected.items())
    assert declared_roles(nn.Sequential(copy.deepcopy(model))) == {f"0.{name}": role for name, role in expected.items()}


@pytest.mark.parametrize(
    ("name", "role", "options", "message"),
    [
        ("fc.wieght", "head", {}, r"ModuleDict has no parameter 'fc\.wieght'; did you mean 'fc\.weight'\?"),
        ("fc", "head", {}, r"no parameter 'fc'; did you mean 'fc\.weight' or 'fc\.bias'\?"),
        ("layers.*.qkv", "matrix", {}, r"no parameter 'layers\.\*\.qkv'; expected one of: blocks\.0"),
        ("zzz", "matrix", {}, r"no parameter 'zzz'; expected one of: blocks\.0"),
        ("fc.weight", "haed", {}, "unknown role 'haed'; did you mean 'head'"),
        ("fc.weight", None, {}, "unknown role None; expected one of: embedding"),
        ("fc.weight", "matrix", {"row_blocks": 2}, r"fc\.weight of shape \(3, 4\): its rows do not divide into 2"),
        ("*weight", "matrix", {"row_blocks": 4}, r"fc\.weight of shape \(3, 4\): its rows"),
        ("fc.bias", "matrix", {"row_blocks": 3}, r"fc\.bias of shape \(3,\): its rows"),
        ("fc.weight", "matrix", {"row_blocks": 3, "split": {"blocks": 3}}, "is short for a split"),
    ],
)
def test_a_wrong_declaration_is_refused_and_mended(name, role, options, message):
    """Not by assert, which is gone under -O and says no more than that."""
    model = vit()
    with pytest.raises(ConfigError, match=message):
        declare(model, name, role, **options)
    assert not declared_roles(model)


def test_of_a_large_model_one_name_is_suggested_and_not_all_listed():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with pytest.raises(ConfigError, match=r"'zzz'; did you mean '\d+\.(weight|bias)'\?$"):
        declare(model, "zzz", "matrix")


def test_a_shared_parameter_may_be_declared_where_either_module_has_it():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model.out.weight = model.embed.weight
    declare(model, "out.weight", "head")
    assert declared_roles(model) == {"embed.weight": ParameterRole(Role.HEAD)}
    declare(model, "embed.weight", "embedding")
    assert declared_roles(model) == {"embed.weight": ParameterRole(Role.EMBEDDING)}


def test_initial_values_need_a_distribution_and_keep_the_one_they_had():
    leaf = Leaf()
    declare(leaf, "extra", "vector")
    with pytest.raises(ConfigError, match="extra was declared without a distribution"):
        initialize_(leaf, 0)
    declare(leaf, "extra", "vector", Constant(3.0))
    declare(leaf, "extra", "matrix")  # what it is changes, not how it starts
    initialize_(leaf, 0)
    assert leaf.extra.item() == 3.0 and declared_roles(leaf)["extra"].role is Role.MATRIX
