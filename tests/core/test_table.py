"""Models made on the meta device are, once they have weights, the models that the constructor makes.

Every module of the package that is used by itself, with every option that changes what it holds.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from quintic.core.initial import initialize_
from quintic.core.roles import declared_roles
from quintic.diffusion.openai import OpenAIFlags, _UNet
from quintic.diffusion.unet import UNet
from quintic.engine.shard import put_away
from quintic.flow import TarFlow
from quintic.lm import LanguageModel, LMConfig
from quintic.lowrank import FactoredLinear, NystromAttention
from quintic.moe import AuxLoss, LossFree, MoE, balance_step

IDS = torch.arange(40).view(2, 20)
TOKENS = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LEVELS = torch.linspace(-3.0, 3.0, 3)
LABELS = torch.tensor([0, 1, 2])
FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4", "channel_mult": "1,2"}


def language(**changes):
    config = LMConfig(context=32, num_layers=2, **changes)
    return lambda: LanguageModel(config, initialize=False), lambda model: model(IDS)


def flow(**options):
    sizes = {"patch": 2, "width": 16, "blocks": 2, "layers": 1, "head_width": 8, "initialize": False}
    labels = LABELS if "num_classes" in options else None
    return lambda: TarFlow((1, 8, 8), **sizes, **options), lambda model: model.log_prob(0.9 * PIXELS, labels)


def unet(**options):
    sizes = {"width": 8, "levels": 2, "blocks": 1, "patch": 1, "initialize": False}
    labels = LABELS if "num_classes" in options else None
    return lambda: UNet((1, 8, 8), **sizes, **options), lambda model: model(PIXELS, LEVELS, labels)


def moe(**options):
    return lambda: MoE(16, 8, 8, 2, initialize=False, **options), lambda model: model(TOKENS)


MODELS = {
    "language model": language(),
    "language model, other options": language(q_rank=16, num_groups=4, top_groups=2, aux_weight=0.1, checkpoint=True),
    "dense language model": language(dense=True),
    "flow": flow(),
    "flow with everything": flow(
        num_classes=3, noise="uniform", preprocess="logit", spline_bins=5, inner_width=6, learned_prior=True
    ),
    "flow the other way": flow(volume_preserving=True, direction="sampling", checkpoint=True),
    "U-Net": unet(heads=2),
    "U-Net with classes": unet(heads=0, num_classes=3, dropout=0.5),
    "experts": moe(),
    "experts with everything": moe(
        score="softmax", select="sigmoid", router_offset=True, normalize_experts="l2", num_groups=4, top_groups=2,
        balance=LossFree("quantile") + AuxLoss(0.1, over="sequence"),
    ),
    "layer of low rank": (lambda: FactoredLinear(16, 12, 4), lambda model: model(TOKENS)),
    "attention by landmarks": (lambda: NystromAttention(16, 2), lambda model: model(TOKENS[None])),
    "OpenAI's U-Net": (
        lambda: _UNet(1, 3, OpenAIFlags(**FLAGS)), lambda model: model(PIXELS, LEVELS.abs(), LABELS),
    ),
}  # fmt: skip


def state_of(model):
    """Everything that a model holds: no list to be kept up to date."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    return {name: getattr(value, "full_tensor", value.detach)() for name, value in found.items()}


def check_alike(model, other, run):
    state, expected = state_of(model), state_of(other)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
    with torch.no_grad(), put_away(model, whole=True):  # a flow is asked by methods beside forward
        assert torch.equal(run(model.eval()), run(other.eval()))


def made(make, seed=3):
    """With weights of which every one matters."""
    model, generator = make(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def without_memory(make):
    with torch.device("meta"):
        model = make()
    assert all(p.is_meta for p in model.parameters())
    return model


@pytest.fixture
def anything(monkeypatch):
    """Memory that holds numbers of before."""
    monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=7))


@pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_model_made_without_memory_loads(make, run, way, anything):
    whole, model = made(make), without_memory(make)
    if way == "to_empty":
        model.to_empty(device="cpu")
    assert not any(model.load_state_dict(copy.deepcopy(whole.state_dict()), assign=way == "assign"))
    check_alike(model, whole, run)


@pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=MODELS)
def test_memory_that_is_taken_anew_loads(make, run, anything):
    """``to_empty`` of a model that had weights, as from one device to another."""
    whole = made(make)
    model = made(make, seed=4).to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    check_alike(model, whole, run)


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def divide(model):
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    for module in (*reversed(blocks), model):
        fully_shard(module)
    return model


@pytest.mark.parametrize("name", [name for name, (make, _) in MODELS.items() if declared_roles(without_memory(make))])
@pytest.mark.parametrize("way", ["to_empty", "load", "assign"])
def test_a_divided_model_made_without_memory_starts_and_loads(name, way, group, anything):
    make, run = MODELS[name]
    whole, model = make(), divide(without_memory(make))
    initialize_(whole, 5)
    if way != "assign":
        model.to_empty(device="cpu")
        initialize_(model, 5)
    if way != "to_empty":
        saved = divide(copy.deepcopy(whole)).state_dict()
        initialize_(model, 6)
        model.load_state_dict(saved, assign=way == "assign")
    check_alike(model, whole, run)


@pytest.mark.parametrize("name", ["language model", "U-Net"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_table_follows_a_cast(name, dtype):
    make, _ = MODELS[name]
    whole = made(make).to(dtype)
    assigned, emptied = without_memory(make), without_memory(make).to(dtype).to_empty(device="cpu")
    assigned.load_state_dict(whole.state_dict(), assign=True)
    for model in (assigned, emptied):
        for one, other in zip(model.buffers(), whole.buffers(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_counters_are_where_an_assigned_bias_is():
    make, _ = MODELS["experts"]
    model = without_memory(make)
    model.load_state_dict(made(make).state_dict(), assign=True)
    balance_step(model)  # before any forward pass
    assert model.counts.device.type == "cpu" and not model.counts.any()
