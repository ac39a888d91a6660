"""The study of likelihoods at a toy size: rates are chosen on validation images, runs are kept, and written up."""

import json

import pytest
import torch
from benchmarks import tarflow_likelihood as study

from quintic.flow import TarFlow


@pytest.fixture
def toy(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = {
        split: torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
        for split, count in (("train", 80), ("validation", 8), ("test", 8))
    }

    def small(width=8):
        return TarFlow(study.SHAPE, patch=14, width=width, blocks=2, layers=1, head_width=8, noise="uniform", seed=0)

    arms = {
        "one": study.Arm(study.usual(small), study._adamw, 1e-3),
        "other": study.Arm(
            {"small": study.Sizes(small), "wide": study.Sizes(lambda: small(16), 8)}, study._adamw, 1e-3
        ),
    }
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setattr(study, "CLAIMS", (("one below the other", "one", "other"),))
    monkeypatch.setattr(study, "SETS", {"toy": ("Toy", 0.2)})
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "PACE", tmp_path / "pace.json")
    monkeypatch.setattr(study, "images", lambda name: data)


def test_it_runs_goes_on_and_is_written_up(toy, tmp_path, monkeypatch):
    result = json.loads(json.dumps(study.run(processes=1)))
    arms = result["sets"]["toy"]
    for arm in arms.values():
        assert f"{arm['best_lr']:.3g}" == min(arm["sweep"], key=arm["sweep"].get)
        assert all(value > 8.0 for value in arm["bits_per_dim"])  # noise has eight bits a pixel; less would be a bug
    other = arms["other"]
    assert list(other["sizes"]) == ["small", "wide"]
    assert other["best_sizes"] == min(other["sizes"], key=other["sizes"].get)
    assert other["sizes"][other["best_sizes"]] == other["sweep"]["0.001"]
    rates = [len(row["sweep"]) for row in arms.values()]
    assert len(list(tmp_path.rglob("*.json"))) == 1 + sum(rates) + 1 + 2 * 2
    section = study.section(result)
    assert "**Toy**" in section and f"**{other['best_sizes']}**" in section
    assert [claim.claim for claim in study.claims(result)] == ["Toy, equal CPU time: one below the other"]

    monkeypatch.setattr(study, "Training", None)  # everything is remembered
    assert study.run(processes=1)["sets"] == result["sets"]


def test_every_claim_is_of_arms_that_run_and_both_choose_among_as_many_sizes():
    assert {arm for _, *both in study.CLAIMS for arm in both} == set(study.ARMS)
    assert {len(arm.sizes) for arm in study.ARMS.values()} == {1, len(study.TARFLOW_SIZES)}


def test_workers_see_one_thread(monkeypatch):
    with study.workers(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def test_a_sweep_goes_on_to_an_interior_optimum():
    tried = study.sweep(1.0, lambda lr: abs(lr - 10.0))
    assert list(tried) == pytest.approx([0.4, 1.0, 2.5, 6.25, 15.625])
    assert len(study.sweep(1.0, lambda lr: -lr)) == study.MOST_RATES
    assert list(study.sweep(1.0, lambda lr: abs(lr - 1.0))) == pytest.approx([0.4, 1.0, 2.5])


def test_a_rate_whose_full_runs_break_gives_way_to_the_next_best(toy, tmp_path, monkeypatch):
    def made_up(path, measure):
        rate, seed, steps = (float(part) for part in path.stem.split("-")[-3:])
        broken = steps == 80 and seed == 1
        if rate > 5e-3:
            return {"bits_per_dim": float("inf") if broken else 1.0, "parameters": 1, "skipped": 0}
        return {"bits_per_dim": 3.0 - 100.0 * rate, "parameters": 1, "skipped": 4 if broken and rate > 2e-3 else 0}

    monkeypatch.setattr(study, "remembered", made_up)
    (tmp_path / "pace.json").write_text(json.dumps({"one": {"": 0.2 / 80}}))
    found = study.measure("toy", "one")
    assert found["broken_lrs"][-1] == pytest.approx(2.5e-3) and min(found["broken_lrs"][:-1]) > 5e-3
    assert found["best_lr"] == 1e-3
