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
    small = study.Arm(
        lambda: TarFlow(study.SHAPE, patch=14, width=8, blocks=2, layers=1, head_width=8, noise="uniform", seed=0),
        study._adamw,
        1e-3,
    )
    monkeypatch.setattr(study, "ARMS", dict.fromkeys((study.OURS, "another"), small))
    monkeypatch.setattr(study, "SETS", {"toy": ("Toy", 0.2)})
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "images", lambda name: data)


def test_it_runs_goes_on_and_is_written_up(toy, tmp_path, monkeypatch):
    result = json.loads(json.dumps(study.run()))
    arm = result["sets"]["toy"][study.OURS]
    assert arm["best_lr"] == float(min(arm["sweep"], key=arm["sweep"].get))
    assert all(value > 8.0 for value in arm["bits_per_dim"])  # noise has eight bits a pixel; less would be a bug
    assert len(list(tmp_path.rglob("*.json"))) == 2 * (3 + 2)
    assert "**Toy**" in study.section(result) and len(study.claims(result)) == 1

    monkeypatch.setattr(study, "train", None)  # everything is remembered
    assert study.run()["sets"] == result["sets"]
