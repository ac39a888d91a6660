"""Blocks compiled for training: whole graphs, compiled once, with the same loss, gradients and loads."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from quintic.core import ConfigError
from quintic.engine.mesh import Ranks
from quintic.engine.shard import divide_, whole
from quintic.lm import LanguageModel, LMConfig, compiling, generate
from quintic.moe import RouteRecorder, aux_loss, balance_step

CONFIG = LMConfig(vocab_size=64, context=32, num_layers=3)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def ids(seed=0):
    return torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(seed))


def trained(model, steps=1):
    """Gradients and loads of the last step of two micro-batches, and the graphs compiled up to each step."""
    graphs = []
    documents = torch.arange(32).expand(2, -1) // 20
    for step in range(steps):
        model.zero_grad()
        for index, part in enumerate(ids(step).chunk(2)):
            counted = torch.arange(32).expand(2, -1) < 30 if index else None  # a padded window comes now and then
            loss = model(part[:, :-1], targets=part[:, 1:], counted=counted, documents=documents)
            (loss + aux_loss(model)).backward()
        loads = [(stats.load, stats.tokens) for stats in balance_step(model)]
        graphs.append(counters["stats"]["unique_graphs"])
    return {name: whole(p.grad) for name, p in model.named_parameters()}, loads, graphs


@pytest.mark.parametrize(
    "changes",
    [{}, {"checkpoint": True}, {"dense": True}, {"qk_clip": 5.0, "q_rank": 16},
     {"aux_weight": 0.1, "aux_over": "sequence", "checkpoint": True, "normalize_experts": "rms"}],
)  # fmt: skip
def test_gradients_and_loads_are_the_same(changes):
    config = replace(CONFIG, **changes)
    plain, loads, _ = trained(LanguageModel(config).train())
    compiled, loads_too, graphs = trained(LanguageModel(replace(config, compile=True)).train())
    assert loads == loads_too
    assert graphs[-1] > 0 or config.checkpoint  # dynamo does not count there
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_one_graph_per_kind_of_block_and_never_again():
    deep = replace(CONFIG, num_layers=6, compile=True)
    _, _, graphs = trained(LanguageModel(deep).train(), steps=4)
    assert graphs == [3] * 4  # dense, experts, experts with padding; breaks are errors (fullgraph)


def test_validation_and_generation_run_uncompiled():
    plain, compiled = (LanguageModel(replace(CONFIG, compile=flag)) for flag in (False, True))
    trained(compiled.train())
    counters.clear()
    compiled.load_state_dict(plain.state_dict())
    with torch.no_grad(), RouteRecorder(compiled.eval()) as routes:
        assert torch.equal(compiled(ids()[:, :-1]), plain.eval()(ids()[:, :-1]))
    assert [int(counts.sum()) for counts in routes.counts] == [4 * 32 * 2] * 2
    texts = [list(generate(model, [1, 2, 3], max_tokens=5, temperature=0.0)) for model in (plain, compiled)]
    assert texts[0] == texts[1]
    assert not counters["stats"]


def test_divided_among_ranks(tmp_path):
    """FSDP's hooks stay outside of what is compiled; a group of one process has them all."""
    plain, loads, _ = trained(LanguageModel(CONFIG).train())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        model = LanguageModel(replace(CONFIG, compile=True)).train()
        divide_(model, Ranks(0, 1, mesh))
        compiled, loads_too, graphs = trained(model)
    finally:
        dist.destroy_process_group()
    assert graphs[-1] > 0 and loads == loads_too
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = LanguageModel(replace(CONFIG, compile=True))
    with torch.no_grad():
        model.eval()(ids()[:, :-1])  # needs none
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*'no-such-compiler'.*lm.compile=false"):
        model.train()(ids()[:, :-1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_the_compiler_of_torch(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    config = replace(CONFIG, num_layers=2)
    plain, loads, _ = trained(LanguageModel(config).train())
    compiled, loads_too, _ = trained(LanguageModel(replace(config, compile=True)).train())
    assert loads == loads_too
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
