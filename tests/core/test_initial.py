"""Where initial weights come from: a seed, torch's default generator, or nowhere, by one rule for every model."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from quintic.core import ConfigError, initial
from quintic.core.initial import initialize_
from quintic.data.config import DataConfig
from quintic.data.tokens import prepare
from quintic.diffusion.unet import UNet
from quintic.flow import TarFlow
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.task import LanguageModelTask
from quintic.moe import MoE


def language(**options):
    return LanguageModel(LMConfig(num_layers=2), **options)


def flow(**options):
    return TarFlow((1, 4, 4), patch=2, width=8, blocks=1, layers=1, head_width=8, num_classes=2, **options)


def unet(**options):
    return UNet((1, 4, 4), width=8, levels=1, blocks=1, heads=0, num_classes=2, **options)


def experts(**options):
    return MoE(16, 8, 4, 2, **options)


def of_task(**options):
    data = prepare(None, DataConfig(tokenizer="byte", validation_fraction=0.01))
    return LanguageModelTask(LMConfig(num_layers=2), data, cross_documents=True).build(**options)


SEEDED = [language, flow, unet, of_task]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [*SEEDED, experts])
def test_without_a_seed_the_generator_of_torch_governs(make):
    models = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        models += [make(), make()]
    for i in range(4):
        assert all(not same(models[i], models[j]) for j in range(i))
    assert same(models[0], models[4]) and same(models[1], models[5])


@pytest.mark.parametrize("make", SEEDED)
def test_a_seed_is_all_that_weights_depend_on(make):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        models += [make(seed=3), make(seed=4)]
        assert torch.equal(torch.get_rng_state(), before)
    assert same(models[0], models[2]) and not same(models[0], models[1])
    other = make(initialize=False)
    initialize_(other, 3)
    assert same(models[0], other)


@pytest.mark.parametrize("make", [*SEEDED, experts])
@pytest.mark.parametrize("way", ["initialize=False", "meta"])
def test_nothing_is_drawn_where_nothing_is_filled(make, way, monkeypatch):
    monkeypatch.setattr(initial, "Stream", None)
    before = torch.get_rng_state()
    with torch.device("meta" if way == "meta" else "cpu"):
        model = make() if way == "meta" else make(initialize=False)
    assert all(p.is_meta for p in model.parameters()) == (way == "meta")
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_must_agree_on_a_seed():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(flow(initialize=False))
        with pytest.raises(ConfigError, match="no seed for a model that is divided among ranks"):
            initialize_(model, None)
        initialize_(model, 0)
    finally:
        dist.destroy_process_group()
