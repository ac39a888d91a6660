"""Blocks compiled for training: whole graphs, compiled once, with the same loss, gradients and loads."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh

from quintic.core import ConfigError
from quintic.core.ranks import Ranks
from quintic.engine.shard import divide_, whole
from quintic.lm import LanguageModel, LMConfig, compiling, generate
from quintic.moe import RouteRecorder, aux_loss, balance_step

CONFIG = LMConfig(vocab_size=64, context=32, num_layers=3)


class Counting:
    """Runs every graph, forward and backward, as it is; counts the graphs and how often they run."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        run = aot_eager(module, example_inputs)

        def counted(*inputs):
            self.runs += 1
            return run(*inputs)

        return counted


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    counting = Counting()
    compiling.compiled.cache_clear()
    monkeypatch.setattr(compiling, "BACKEND", counting)
    torch._dynamo.reset()
    yield counting
    compiling.compiled.cache_clear()


def ids(seed=0):
    return torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(seed))


def trained(model, steps=1, padded=True):
    """Gradients and loads of the last step of two micro-batches."""
    documents = torch.arange(32).expand(2, -1) // 20
    for step in range(steps):
        model.zero_grad()
        for index, part in enumerate(ids(step).chunk(2)):
            # A padded window comes now and then, and is a variant that is compiled by itself.
            counted = torch.arange(32).expand(2, -1) < 30 if padded and index else None
            loss = model(part[:, :-1], targets=part[:, 1:], counted=counted, documents=documents)
            (loss + aux_loss(model)).backward()
        loads = [(stats.load, stats.tokens) for stats in balance_step(model)]
    return {name: whole(p.grad) for name, p in model.named_parameters()}, loads


def assert_close(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=0.1 * rtol * scale, msg=name)


def test_one_graph_per_kind_of_block_and_never_again(compiler):
    config = replace(CONFIG, num_layers=5)
    plain, compiled = (LanguageModel(replace(config, compile=flag), seed=0).train() for flag in (False, True))
    for steps, runs in ((1, 2 * 5), (2, 3 * 2 * 5)):
        expected, loads = trained(plain, steps)
        found, loads_too = trained(compiled, steps)
        assert compiler.graphs == 3  # dense, experts, experts with padding; a break would be an error
        assert compiler.runs == runs
        assert loads == loads_too
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("changes", "padded"),
    [
        ({"qk_clip": 5.0, "q_rank": 16, "dense": True}, False),
        ({"checkpoint": True, "aux_weight": 0.1, "aux_over": "sequence", "normalize_experts": "rms"}, True),
    ],
)
def test_gradients_and_loads_are_the_same(changes, padded, compiler):
    config = replace(CONFIG, num_layers=2, **changes)
    plain, loads = trained(LanguageModel(config, seed=0).train(), padded=padded)
    assert not compiler.runs
    compiled, loads_too = trained(LanguageModel(replace(config, compile=True), seed=0).train(), padded=padded)
    assert compiler.runs == 2 * 2 * (2 if config.checkpoint else 1)
    assert loads == loads_too
    assert_close(compiled, plain)


def test_validation_and_generation_run_uncompiled(compiler):
    plain, compiled = (LanguageModel(replace(CONFIG, compile=flag), seed=0) for flag in (False, True))
    with torch.no_grad(), RouteRecorder(compiled.eval()) as routes:
        assert torch.equal(compiled(ids()[:, :-1]), plain.eval()(ids()[:, :-1]))
    assert [int(counts.sum()) for counts in routes.counts] == [4 * 32 * 2] * 2
    texts = [list(generate(model.train(), [1, 2, 3], max_tokens=5, temperature=0.0)) for model in (plain, compiled)]
    assert texts[0] == texts[1]
    assert not compiler.runs


def test_divided_among_ranks(tmp_path, compiler):
    """FSDP's hooks stay outside of what is compiled; a group of one process has them all."""
    config = replace(CONFIG, num_layers=2)
    plain, loads = trained(LanguageModel(config, seed=0).train(), padded=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        model = LanguageModel(replace(config, compile=True), seed=0).train()
        divide_(model, Ranks(0, 1, mesh))
        compiled, loads_too = trained(model, padded=False)
    finally:
        dist.destroy_process_group()
    assert compiler.runs and loads == loads_too
    assert_close(compiled, plain)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = LanguageModel(replace(CONFIG, compile=True), seed=0)
    with torch.no_grad():
        model.eval()(ids()[:, :-1])  # needs none
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*'no-such-compiler'.*lm.compile=false"):
        model.train()(ids()[:, :-1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_the_compiler_of_torch(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    config = replace(CONFIG, num_layers=2)
    plain, loads = trained(LanguageModel(config, seed=0).train())
    compiled, loads_too = trained(LanguageModel(replace(config, compile=True), seed=0).train())
    assert loads == loads_too
    assert_close(compiled, plain, rtol=1e-3)
