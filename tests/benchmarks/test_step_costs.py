"""The benchmarks of a step's floor, of memory and of two processes: they count rightly and run at a tiny size."""

import doctest
import importlib
import json

import pytest
import torch
from benchmarks import memory, step_floor, two_processes
from torch.nn import functional as F

from quintic.lm.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("name", ["step_floor", "memory", "two_processes"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert found.attempted and not found.failed


def test_every_product_is_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert step_floor.flops_of(lambda: torch.zeros(3, 7).addmm_(a, b)) == 2 * 3 * 5 * 7
    q = torch.randn(2, 4, 32, 8, requires_grad=True)

    def attend():
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    # Two products forward and four backward, of half of 32 x 32 pairs.
    assert step_floor.flops_of(attend) == 6 * 2 * (2 * 4) * 32 * 32 * 8 // 2
    x, w = torch.randn(40, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
    targets = torch.zeros(40, dtype=torch.int64)
    assert step_floor.flops_of(lambda: linear_cross_entropy(x, w, targets).backward()) == 3 * 2 * 40 * 8 * 24


def test_parts_make_up_the_step_and_agree_with_the_model_s_own_formula():
    model, optimizer, there_and_back, batch = step_floor.prepared([], "tiny")
    before = [p.detach().clone() for p in model.parameters()]
    parts = step_floor.parts_of(model, optimizer, batch)
    counted = {name: step_floor.flops_of(act) for name, act in parts.items()}
    trained = sum(flops for name, flops in counted.items() if name != "optimizer")
    assert trained == step_floor.flops_of(there_and_back)
    assert trained == pytest.approx(
        batch * model.config.context * model.flops_per_token(model.config.context), rel=0.02
    )
    assert counted["optimizer"] > 0
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter)  # nothing was trained: every turn does the same work


def test_the_floor_is_written_up():
    part = {"gflop": 1.0, "ms": 40.0, "products_ms": 25.0}
    step = {"gflop": 3.0, "step_ms": 100.0, "tokens_per_second": 5e4, "optimizer_share": 0.2, "active": 9e5}
    result = {
        "machine": {"cpu": "a cpu", "threads": 1, "torch": "2"}, "size": "laptop", "batch": 16, "peak_gflops": 100.0,
        "parts": {"attention": part, "optimizer": {**part, "ms": 12.0, "products_ms": 11.0}},
        "attention_kernel": {"gflop": 0.5, "ms": 10.0},
        "variants": {"as it is": step, "other": {**step, "step_ms": 60.0}, "worse": {**step, "step_ms": 200.0}},
    }  # fmt: skip
    text = step_floor.section(json.loads(json.dumps(result)))
    # A fraction is the rate of the products times their share.
    assert "| attention | 1.00 | 10.0 | 40.0 | 25% | 40% | 62% | 40% |" in text
    assert "| rest |  |  | 48.0 |  |  |  | 48% |" in text and "| whole step | 3.00 | 30.0 | 100.0 | 30% |" in text
    assert "30.0 ms above the floor, 15.0 of them" in text and "15.0 outside products" in text
    assert "bfloat16" not in text
    half = {"step_ms": 50.0, "tokens_per_second": 1e5, "peak_gflops": 600.0}
    assert "10% of a peak of 600 GFLOP/s" in step_floor.section({**result, "bfloat16": half})
    (claim,) = step_floor.claims(result)
    assert claim.holds == "no" and claim.measured == '30%; "other" reaches 50%'


def test_changes_of_the_preset_are_legal_and_keep_the_active_parameters():
    from quintic.cli.wiring import build_settings
    from quintic.lm import LanguageModel

    active = {}
    for title, changes in step_floor.VARIANTS.items():
        config = build_settings("lm", "laptop", changes)["lm"]
        with torch.device("meta"):
            active[title] = LanguageModel(config, initialize=False).num_parameters()[1]
    assert all(abs(n / active[step_floor.AS_IT_IS] - 1) < 0.2 for n in active.values()), active


def test_the_floor_runs():
    variants = {"as it is": [], "dense": ["lm.dense=true"]}
    result = json.loads(json.dumps(step_floor.run("tiny", variants, steps=4, rounds=1)))
    assert set(result["variants"]) == set(variants)
    assert all(p["products_ms"] > 0 and p["ms"] > 0 for p in result["parts"].values())
    assert 0 < result["attention_kernel"]["gflop"] < result["parts"]["attention"]["gflop"]
    assert "dense" in step_floor.section(result) and step_floor.claims(result)


def test_chunks_need_less_memory():
    whole, chunked = (memory.mebibytes("loss", saving, 256) for saving in (False, True))
    logits = 256 * memory.VOCABULARY * 4 / 2**20
    assert logits < whole and 0 < chunked < whole


@pytest.mark.slow
def test_chunks_and_kept_inputs_need_less_memory():
    result = json.loads(json.dumps(memory.run(256)))
    assert result["tokens"] == 256
    for mib in result["mib"].values():
        assert 0 < mib["True"] < mib["False"]
    assert "256 tokens" in memory.section(result) and memory.claims(result)


@pytest.mark.slow
def test_two_processes_run():
    result = json.loads(json.dumps(two_processes.run(4, "tiny", rounds=1)))
    assert all(len(spent) == 1 and spent[0] > 0 for spent in result["step_ms"].values())
    assert two_processes.ratios(result)["one process"] == 1.0
    assert two_processes.section(result) and two_processes.claims(result)


def test_one_process_runs():
    median, least = two_processes.milliseconds(1, [], 3, "tiny")
    assert median >= least > 0


def test_two_processes_compare():
    made = {title: [100.0, 120.0] for title in two_processes.WAYS}
    made |= {"two, weights divided": [130.0, 156.0], two_processes.APART: [80.0, 96.0]}
    machine = {"cpu": "a cpu", "cpu_count": 2, "torch": "2"}
    least = {title: [0.9 * t for t in spent] for title, spent in made.items()} | {two_processes.ONE: [80.0, 75.0]}
    result = {"machine": machine, "size": "laptop", "rounds": 2, "step_ms": made, "least_ms": least}
    assert two_processes.ratios(result)["two, weights divided"] == pytest.approx(1.3)
    assert two_processes.communication(result) == pytest.approx(0.2)
    assert two_processes.least_ratios(result)["two, weights divided"] == pytest.approx(117 / 75)
    assert "| two, weights divided | 143 | 1.30 | 117 | 1.56 |" in two_processes.section(result)
    assert two_processes.claims(result)[0].holds == "no"


def test_a_failed_training_is_told():
    with pytest.raises(RuntimeError, match="training failed"):
        two_processes.milliseconds(1, ["no.such=1"], 2, "tiny")
