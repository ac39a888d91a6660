"""Every study runs from end to end at a toy size, and its bricks do what they say."""

import doctest
import importlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import muon_race, study
from benchmarks.__main__ import BENCHMARKS, RESULTS, stamped
from benchmarks.claims import claims_section
from benchmarks.gpt import GPT, text
from benchmarks.plot import Line, draw
from benchmarks.study import Book, Run, arm_run, paired, spread, train

TOY = Run(layers=1, width=8, heads=1, context=8, batch=2, steps=5, held_out=128)
START = (0.05,)
SEEDS = (0, 1)


def quiet(_):
    pass


def run_study(name, folder):
    module = importlib.import_module(f"benchmarks.{name}")
    book = Book(name, folder, quiet)
    if name in ("muon_race", "equal_time"):
        return module, module.run(book, {"small": (TOY, (0.95,))}, START, SEEDS, rounds=2)
    if name == "sizes":
        return module, module.run(book, (TOY, replace(TOY, width=16)), START, SEEDS)
    if name == "overfitting":
        base = replace(TOY, characters=500, track=2, optim={"lr": 0.05})
        return module, module.run(book, base, 0.1, SEEDS)
    if name == "finetuning":
        return module, module.run(book, TOY, replace(TOY, text="python"), START, SEEDS)
    if name == "scale":
        return module, module.run(book, TOY, {"adamw": START, "muon": START}, SEEDS)
    return module, module.run(book, TOY, START, SEEDS)


@pytest.mark.parametrize(
    "name", ["muon_race", "equal_time", "scale", "trust_regions", "overfitting", "clipping", "sizes", "finetuning"]
)
def test_a_study_runs_and_is_written_up(name, tmp_path):
    assert name in BENCHMARKS
    module, result = run_study(name, tmp_path)
    result = json.loads(json.dumps(result))  # as RESULTS.md reads it
    section = module.section(result)
    assert section.startswith("## ") and f"`python -m benchmarks {name}`" in section
    assert not re.search(r"\bnan\b", section)
    plots = module.plots(result) if hasattr(module, "plots") else {}
    assert {f"benchmarks/plots/{plot}.svg" for plot in plots} == {
        part.split(")")[0] for part in section.split("](")[1:]
    }
    for svg in plots.values():
        assert ElementTree.fromstring(svg).get("aria-label")
    claims = module.claims(result)
    assert claims and all(claim.command == name and claim.seeds == len(SEEDS) for claim in claims)
    assert all(claim.claim in claims_section(claims) for claim in claims)
    # Everything is remembered: running again trains nothing.
    runs = (tmp_path / f"{name}.jsonl").read_text()
    run_study(name, tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_text() == runs


def test_the_speed_benchmark_runs():
    from benchmarks import muon_speed

    threads = torch.get_num_threads()
    lists = {"two": [(8, 8), (4, 16)]}
    result = muon_speed.run(((2, 8, 8), (2, 4, 16)), lists, "tiny", seconds=0.0, limited=["two"])
    assert torch.get_num_threads() == threads
    assert result["steps"]["two"]["quintic"] > 0 and result["demo"]["optimizer"] > 0
    assert "| two | " in muon_speed.section(json.loads(json.dumps(result)))
    assert muon_speed.claims(result)


def test_the_loop_of_the_speed_benchmark_is_torchs_method():
    from benchmarks.muon_speed import LoopMuon, loop

    G = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    ours = [torch.nn.Parameter(torch.ones(12, 5)) for _ in range(2)]
    for p in ours:
        p.grad = G.clone()
    LoopMuon([ours[0]]).step()
    torch.optim.Muon([ours[1]]).step()
    assert torch.allclose(ours[0], ours[1], atol=2e-5)  # torch's is in bfloat16
    sigma = torch.linalg.svdvals(loop(G))
    assert sigma.min() > 0.6 and sigma.max() < 1.3


@pytest.mark.parametrize("name", ["claims", "sizes", "study"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


def test_runs_are_exact_and_differ_by_seed():
    assert train(TOY)[0].loss == train(TOY)[0].loss != train(replace(TOY, seed=1))[0].loss


def test_a_run_is_known_however_it_is_written(tmp_path):
    book = Book("a", tmp_path, quiet)
    first = book(TOY)
    again = replace(TOY, optim={"name": "muon", "weight_decay": 0.1, "clip_norm": 1.0})  # the defaults
    assert Book("b", tmp_path, quiet)(again) == first
    assert not (tmp_path / "b.jsonl").exists()
    assert Book("b", tmp_path, quiet)(replace(TOY, optim={"weight_decay": 0.2})).loss != first.loss


def test_a_run_may_begin_where_another_ended(tmp_path):
    still = replace(TOY, steps=1, optim={"lr": 1e-12})
    before = replace(TOY, optim={"lr": 0.05})
    book = Book("a", tmp_path, quiet)
    assert book(replace(still, start=before)).loss == pytest.approx(book(before).loss, abs=1e-6)
    assert book(still).loss != book(before).loss


def test_matrix_rate_scales_the_update_and_keeps_the_decay():
    def steps(run):
        start = GPT(run.layers, run.width, run.heads, run.context, run.seed)
        end = train(run)[1]
        return {name: dict(end.named_parameters())[name] - p for name, p in start.named_parameters()}

    one = replace(TOY, steps=1, optim={"lr": 0.01, "weight_decay": 0.0, "warmup_fraction": 0.0, "schedule": "constant"})
    plain, twice = steps(one), steps(replace(one, matrix_lr=2.0))
    assert torch.allclose(twice["blocks.0.up.weight"], 2 * plain["blocks.0.up.weight"], atol=1e-7)
    assert torch.equal(twice["tokens.weight"], plain["tokens.weight"])
    decayed = steps(replace(one, matrix_lr=2.0, optim={**one.optim, "weight_decay": 0.5}))
    start = dict(GPT(1, 8, 1, 8, 0).named_parameters())["blocks.0.up.weight"]
    difference = decayed["blocks.0.up.weight"] - twice["blocks.0.up.weight"]
    assert torch.allclose(difference, -0.01 * 0.5 * start, atol=1e-7)


def test_the_posts_decay_shrinks_the_largest_singular_value_alone():
    U, _, Vh = torch.linalg.svd(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), full_matrices=False)
    W = torch.nn.Parameter(U @ torch.diag(torch.tensor([8.0, 2.0, 1.0, 0.5])) @ Vh)
    study._post_decay(W, (1, 6, 4), 0.25)
    assert torch.linalg.svdvals(W).tolist() == pytest.approx([6.0, 2.0, 1.0, 0.5], abs=1e-4)


def test_divergence_is_an_infinite_loss(tmp_path):
    wild = replace(TOY, steps=20, optim={"name": "adamw", "lr": 1e30, "clip": "none", "warmup_fraction": 0.0})
    assert Book("a", tmp_path, quiet)(wild).loss == math.inf
    assert Book("a", tmp_path, quiet)(wild).loss == math.inf  # remembered too


def test_an_arm_overrides_the_base():
    base = replace(TOY, optim={"clip_norm": 0.5, "momentum": 0.9})
    run = arm_run(base, {"optim": {"momentum": 0.8}, "matrix_lr": 3.0}, 0.1, 7, 0.4)
    assert run == replace(base, optim={"clip_norm": 0.5, "momentum": 0.8, "lr": 0.1}, matrix_lr=3.0, seed=7, steps=2)


def test_intervals():
    from scipy import stats

    values = [1.0, 1.4, 0.9]
    found = spread(values)
    low, high = stats.t.interval(0.95, 2, loc=found["mean"], scale=stats.sem(values))
    assert found["mean"] - found["half"] == pytest.approx(low, abs=1e-3)
    assert found["mean"] + found["half"] == pytest.approx(high, abs=1e-3)
    assert paired([2.0, 3.0], [1.0, 2.0]) == pytest.approx({"mean": 1.0, "sd": 0.0, "half": 0.0, "n": 2})


def test_flops_of_newton_schulz_on_a_square():
    from benchmarks.muon_race import muon_flops

    d = 16
    squares = 4 * 5 * 6 * d**3  # five times 4 n^2 m + 2 n^3
    oblong = 2 * (8 * 4 + 28) * d**3  # section 1.7 of the Gram form's table: 8 alpha + 28
    assert muon_flops(Run(layers=1, width=d)) == squares + oblong


def test_plots_place_points_by_their_axes():
    svg = ElementTree.fromstring(
        draw("a < b", [Line("one", [1, 10, 100], [0.0, math.nan, 2.0], [0.5, 0.5, 0.5])], x="x", y="y", log_x=True)
    )
    name = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{name}circle")]
    assert len(circles) == 2  # what is not finite is left out
    grid = {t.text: float(t.get("y")) - 4 for t in svg.iter(f"{name}text") if t.get("text-anchor") == "end"}
    assert circles[0][1] == pytest.approx(grid["0.0"], abs=0.1) and circles[1][1] == pytest.approx(grid["2.0"], abs=0.1)
    assert svg.get("aria-label") == "a < b"


def test_texts_are_of_the_vocabulary():
    from benchmarks.gpt import vocabulary

    for name in ("moby", "python"):
        assert len(text(name)) > 900_000 and int(text(name).max()) < len(vocabulary())
    assert "".join(vocabulary()[i] for i in text("moby")[:200].tolist()).strip()


def test_the_posts_decay_replaces_that_of_the_matrices_alone():
    base = replace(TOY, steps=1, optim={"lr": 0.1, "weight_decay": 0.5, "warmup_fraction": 0.0, "schedule": "constant"})
    none = dict(train(replace(base, optim={**base.optim, "weight_decay": 0.0}))[1].named_parameters())
    plain = dict(train(base)[1].named_parameters())
    post = dict(train(replace(base, matrix_decay="post"))[1].named_parameters())
    assert torch.equal(post["tokens.weight"], plain["tokens.weight"])  # AdamW's half keeps its own
    assert not torch.equal(post["tokens.weight"], none["tokens.weight"])
    # What it took off a matrix is of rank one.
    sigma = torch.linalg.svdvals(none["blocks.0.up.weight"] - post["blocks.0.up.weight"])
    assert sigma[0] > 1e-4 and sigma[1] < 1e-3 * sigma[0]


def test_committed_plots_are_those_of_the_committed_results():
    root = Path(__file__).parent.parent.parent / "benchmarks"
    drawn = {}
    for path in sorted((root / "results").glob("*.json")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        if hasattr(module, "plots"):
            drawn |= module.plots(json.loads(path.read_text(encoding="utf-8")))
    assert drawn == {name: (root / "plots" / f"{name}.svg").read_text(encoding="utf-8") for name in drawn}


def test_a_result_is_kept_with_version_seeds_and_machine():
    import quintic

    made = stamped({"seed": 7, "x": 1}, muon_race)
    assert (made["version"], made["seeds"], made["x"]) == (quintic.__version__, [7], 1)
    assert made["machine"]["cpu"] and "AMX" in made["machine"]["instructions"]
    assert stamped({"machine": {"cpu": "c"}}, muon_race)["machine"] == {"cpu": "c"}
    assert stamped({}, muon_race)["seeds"] == list(muon_race.SEEDS) and stamped({}, study)["version"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_version_seeds_and_machine(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", result["version"]) and all(isinstance(seed, int) for seed in result["seeds"])
    # A few were taken before the machine was written down: they say so by null.
    assert result["machine"] is None or {"cpu", "threads", "torch"} <= set(result["machine"])
