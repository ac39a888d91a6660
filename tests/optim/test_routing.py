"""Who goes where: declared roles, other people's modules, ambiguity."""

import warnings

import pytest
import torch
from torch import nn

from quintic.core import ConfigError
from quintic.core.roles import Constant, Normal, Role, declare
from quintic.optim import Muon, roles


def algorithms(model):
    return {row.name: row.algorithm for row in roles(model)}


class Declared(nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape, role, blocks in [
            ("embed", (11, 6), Role.EMBEDDING, 1),
            ("proj", (8, 6), Role.MATRIX, 1),
            ("gate_up", (16, 6), Role.MATRIX, 2),
            ("experts", (3, 8, 6), Role.EXPERT_STACK, 1),
            ("fused", (3, 16, 6), Role.EXPERT_STACK, 2),
            ("router", (3, 6), Role.ROUTER, 1),
            ("gain", (6,), Role.VECTOR, 1),
            ("head", (11, 6), Role.HEAD, 1),
        ]:
            setattr(self, name, nn.Parameter(torch.randn(shape)))
            init = Constant(1.0) if role is Role.VECTOR else Normal(0.02)
            declare(self, name, role, init, row_blocks=blocks)


def test_declared_roles_decide():
    model = nn.Sequential(Declared())
    table = roles(model, strict=True)
    assert {row.name: (row.role, row.algorithm) for row in table} == {
        "0.embed": (Role.EMBEDDING, "adamw"),
        "0.proj": (Role.MATRIX, "muon"),
        "0.gate_up": (Role.MATRIX, "muon"),
        "0.experts": (Role.EXPERT_STACK, "muon"),
        "0.fused": (Role.EXPERT_STACK, "muon"),
        "0.router": (Role.ROUTER, "muon"),
        "0.gain": (Role.VECTOR, "adamw"),
        "0.head": (Role.HEAD, "adamw"),
    }
    assert table["0.fused"].scale == pytest.approx(0.2 * 8**0.5)  # the scale of one block
    assert table["0.proj"].update_rms == pytest.approx(0.2)
    with pytest.raises(KeyError):
        table["nobody"]


@pytest.mark.parametrize("scale", ["moonlight", "keller"])
def test_row_blocks_are_matrices_of_their_own(scale):
    model = Declared()
    separate = [nn.Parameter(part.clone()) for part in model.gate_up.detach().chunk(2)]
    separate += [nn.Parameter(part.clone()) for part in model.fused.detach().chunk(2, dim=1)]
    a, b = Muon(model, lr=0.1, adamw_lr=0.1, scale=scale), Muon(separate, lr=0.1, scale=scale)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for p, g in zip(separate, [*model.gate_up.grad.chunk(2), *model.fused.grad.chunk(2, dim=1)], strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(model.gate_up.detach(), torch.cat([p.detach() for p in separate[:2]]))
    torch.testing.assert_close(model.fused.detach(), torch.cat([p.detach() for p in separate[2:]], 1))
    with pytest.raises(ConfigError, match="do not split into"):
        Muon([{"params": [nn.Parameter(torch.zeros(4, 4))], "split": {"blocks": 3}}])


def test_a_declared_role_must_fit_the_shape():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2, 3, 4))
    declare(model, "w", Role.MATRIX, Normal(1.0))
    with pytest.raises(ConfigError, match=r"w is declared as matrix but has shape \(2, 3, 4\)"):
        roles(model)


class Transformer(nn.Module):
    def __init__(self, head="lm_head", tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        setattr(self, head, nn.Linear(16, 50, bias=False))
        if tied:
            getattr(self, head).weight = self.embed.weight


@pytest.mark.parametrize("head", ["lm_head", "Head", "to_vocabulary"])
def test_transformer(head):
    """The head is known by its name, or by being last and as large as the embedding."""
    found = algorithms(Transformer(head))
    assert {name for name, algorithm in found.items() if algorithm == "muon"} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
        "down.weight",
    }
    assert not roles(Transformer(head), strict=True).ambiguous


@pytest.mark.parametrize("order", ["embedding first", "head first"])
def test_tied_weights_appear_once_under_adamw(order):
    model = Transformer(tied=True)
    if order == "head first":
        model.embed, embed = None, model.embed
        del model.embed
        model.embed = embed  # registered last now
    table = roles(model, strict=True)
    rows = [row for row in table if row.shape == (50, 16)]
    assert len(rows) == 1
    assert rows[0].algorithm == "adamw"
    assert "tied" in rows[0].why
    optimizer = Muon(model)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_hugging_face_models_name_their_head():
    model = Transformer("proj_out_xyz")
    model.extra = nn.Linear(16, 16)  # so that the head is not last
    assert algorithms(model)["proj_out_xyz.weight"] == "muon"
    model.get_output_embeddings = lambda: model.proj_out_xyz
    assert algorithms(model)["proj_out_xyz.weight"] == "adamw"


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.ConvTranspose2d(32, 16, 2),
        nn.Conv1d(16, 8, 5),
    )
    model.classifier = nn.Linear(8, 10)
    table = roles(model, scale="keller", strict=True)
    assert {row.name for row in table if row.algorithm == "muon"} == {"2.weight", "5.weight"}
    assert table["2.weight"].layout == "conv"
    assert table["2.weight"].scale == pytest.approx(1.0)  # (32, 144), not (3, 3)
    assert "pixels" in table["0.weight"].why
    optimizer = Muon(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_a_convolution_behind_a_linear_layer_sees_features():
    assert algorithms(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 8, 3), nn.ReLU()))["1.weight"] == "muon"


def test_experts_are_known_by_the_name_of_their_place_or_of_their_class():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 6))

    class MoEStack(Stack):
        pass

    table = roles(nn.ModuleDict({"experts": Stack(), "a": MoEStack(), "b": Stack()}))
    assert [table[f"{n}.up"].role is Role.EXPERT_STACK for n in ("experts", "a", "b")] == [True, True, False]


def test_experts_and_routers_of_other_libraries():
    class SomeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 6))

    class TopKRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6))

    class BitLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6))

    model = nn.ModuleDict({"e": SomeExperts(), "r": TopKRouter(), "l": BitLinear(), "head": nn.Linear(6, 5)})
    table = roles(model, strict=True)
    assert table["e.up"].role is Role.EXPERT_STACK
    assert table["r.weight"].role is Role.ROUTER
    assert table["l.weight"].role is Role.MATRIX
    assert [table[n].algorithm for n in ("e.up", "r.weight", "l.weight")] == ["muon"] * 3


def test_what_cannot_be_told_is_said():
    """An unknown matrix goes to AdamW, loudly; strict refuses."""
    model = Transformer()
    model.position = nn.Parameter(torch.zeros(1, 8, 16))
    model.bias = nn.Parameter(torch.zeros(1, 1, 16))  # a bias by name, whatever its axes
    assert algorithms(model)["position"] == "adamw"
    assert [row.name for row in roles(model).ambiguous] == ["position"]
    with pytest.warns(UserWarning, match=r"assumed: position\. Say") as warned:
        Muon(model)
    assert warned[0].filename == __file__  # the user's line
    with pytest.raises(ConfigError, match=r"position.*role not declared"):
        roles(model, strict=True)
    with pytest.raises(
        ConfigError, match=r"as by quintic\.declare\(model, 'position', 'embedding'\), or 'expert stack'"
    ):
        Muon(model, strict=True)
    declare(model, "position", "embedding")
    Muon(model, strict=True)


def test_a_last_layer_that_may_be_the_output_is_ambiguous():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert algorithms(mlp)["2.weight"] == "muon"
    with pytest.raises(ConfigError, match=r"2\.weight.*output layer"):
        roles(mlp, strict=True)
    with pytest.warns(
        UserWarning, match=r"assumed: 2\.weight\. Say .*declare\(model, '2\.weight', 'head'\), or 'matrix'"
    ):
        Muon(mlp)


@pytest.mark.parametrize("name", ["lm_head", "Head", "classifier", "fc"])
def test_output_layers_are_known_by_name(name):
    table = roles(nn.ModuleDict({"hidden": nn.Linear(4, 8), name: nn.Linear(8, 3)}), strict=True)
    assert [table[f"{n}.weight"].algorithm for n in ("hidden", name)] == ["muon", "adamw"]


@pytest.mark.parametrize(
    ("path", "algorithm"),
    [
        ("fc", "adamw"),  # torchvision's ResNet
        ("module.fc", "adamw"),  # the same in DistributedDataParallel
        ("head.fc", "adamw"),  # timm's ConvNeXt
        ("classifier.6", "adamw"),  # torchvision's VGG
        ("layers.11.fc", "muon"),  # the last of many blocks
        ("encoder.layer.11.output.dense", "muon"),  # BERT without a head
    ],
)
def test_a_last_layer_by_the_name_of_its_place(path, algorithm):
    model = nn.ModuleDict({"fc": nn.Linear(4, 8)}) if path != "fc" else nn.ModuleDict({"hidden": nn.Linear(4, 8)})
    *above, last = path.split(".")
    module = model
    for part in above:
        module[part] = nn.ModuleDict()
        module = module[part]
    module[last] = nn.Linear(8, 3)
    first, found = roles(model)["fc.weight" if path != "fc" else "hidden.weight"], roles(model)[f"{path}.weight"]
    assert (first.algorithm, found.algorithm) == ("muon", algorithm)  # a hidden layer of that name stays one
    assert found.ambiguous == (algorithm == "muon")


@pytest.mark.parametrize(("groups", "algorithm"), [(1, "muon"), (2, "adamw"), (8, "adamw")])
def test_a_convolution_in_groups_is_not_one_matrix(groups, algorithm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU())
    assert algorithms(model)["1.weight"] == algorithm


def test_recurrent_weights():
    assert algorithms(nn.LSTM(4, 8))["weight_hh_l0"] == "muon"
    assert algorithms(nn.LSTM(4, 8))["bias_hh_l0"] == "adamw"
    assert algorithms(nn.LayerNorm((4, 5))) == {"weight": "adamw", "bias": "adamw"}  # a gain by its module
    assert not roles(nn.LayerNorm((4, 5))).ambiguous
    assert algorithms(nn.GRU(4, 8))["weight_ih_l0"] == "muon"


def test_table_prints_every_row_and_the_totals():
    text = str(roles(Declared()))
    lines = text.splitlines()
    assert len(lines) == 1 + 8 + 1
    assert repr(roles(Declared())) == text  # as an interactive session shows it
    assert "parameter" in lines[0]
    assert "lr x" in lines[0]
    column = lines[0].index("role")
    assert lines[1][column:].startswith("embedding")
    muon = 48 + 96 + 144 + 288 + 18
    assert f"{muon:,} ({100 * muon / (muon + 138):.1f}%) under Muon, 138 under AdamW" in lines[-1]


def test_works_on_the_meta_device_and_without_parameters():
    with torch.device("meta"):
        assert roles(Transformer()).parameters_under("muon") == 16 * 48 + 16 * 16 + 2 * 16 * 64
    assert "0 parameters" in str(roles(nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: nothing to initialise
        assert roles(nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0)), scale="mup").parameters_under("muon") == 0


def test_table_and_optimizer_agree():
    model = Declared()
    optimizer = Muon(model)
    for row in optimizer.roles:
        (group,) = [g for g in optimizer.param_groups if row.name in g["param_names"]]
        for name in ("algorithm", "layout", "split", "orientation"):
            assert group[name] == getattr(row, name)
