"""Damage of every kind is found, and the newest whole checkpoint is used."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quintic.core import CheckpointError
from quintic.core.files import sha256_file
from quintic.core.ranks import Ranks
from quintic.core.roles import Normal, Role, declare
from quintic.engine import checkpoint as ck
from quintic.engine.saving import take_snapshot, write_checkpoint
from quintic.optim import Muon


def trained(seed=0, steps=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.LayerNorm(4))
    declare(model[2], "weight", Role.MATRIX, Normal(0.1))  # a last Linear would be taken for a head, with a warning
    optimizer = Muon(model, lr=0.01)
    for _ in range(steps):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def folder(tmp_path):
    model, optimizer = trained()
    for step in (5, 10, 100):
        state = ck.TrainState(step=step, row={"step": step, "x": 0.1})
        write_checkpoint(tmp_path, take_snapshot(model, optimizer, state))
    return tmp_path


def test_round_trip_is_exact(folder):
    model, optimizer = trained()
    other, empty = trained(seed=1, steps=0)
    ck.load_model(folder / "step-100", other)
    state = ck.load_training(folder / "step-100", other, empty)
    assert state == ck.TrainState(step=100, row={"step": 100, "x": 0.1})
    x = torch.randn(4, 6)
    for pair in ((model, optimizer), (other, empty)):
        pair[0](x).square().sum().backward()
        pair[1].step()
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_listing_is_numeric_and_ignores_the_unfinished(folder):
    (folder / "step-200.tmp").mkdir()
    (folder / "step-x").mkdir()
    assert list(ck.list_checkpoints(folder)) == [5, 10, 100]
    assert ck.list_checkpoints(folder / "none") == {}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def reseal(checkpoint, only=None, also=()):
    """Write a manifest that agrees with what is there."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"] if only is None else only
    for name in also:
        if not (checkpoint / name).exists():
            (checkpoint / name).write_bytes((checkpoint / "model.safetensors").read_bytes())
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_file(checkpoint / name)}
        for name in (*names, *also)
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": ck.FORMAT, "files": files}))


DAMAGE = {
    "flipped weights": lambda c: flip(c / "model.safetensors"),
    "flipped optimizer": lambda c: flip(c / "training.safetensors"),
    "truncated": lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-5]),
    "missing file": lambda c: (c / "state.json").unlink(),
    "missing manifest": lambda c: (c / "manifest.json").unlink(),
    "torn manifest": lambda c: (c / "manifest.json").write_text('{"format": 1, "fil'),
    "odd manifest": lambda c: (c / "manifest.json").write_text("[]"),
    "deep manifest": lambda c: (c / "manifest.json").write_text("[" * 200_000),
    "manifest of nothing": lambda c: reseal(c, only=()),
    "manifest without weights": lambda c: reseal(c, only=("training.safetensors", "state.json")),
    "manifest without numbers": lambda c: reseal(c, only=("training.safetensors", "model.safetensors")),
    "manifest of half the weights": lambda c: reseal(
        c, only=("training.safetensors", "state.json"), also=("model-00001-of-00002.safetensors",)
    ),
    "manifest of files elsewhere": lambda c: reseal(c, also=("../step-10/state.json",)),
    "newer format": lambda c: (c / "manifest.json").write_text(json.dumps({"format": 99, "files": {}})),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_previous_one_used(folder, kind):
    DAMAGE[kind](folder / "step-100")
    with pytest.raises(CheckpointError, match="step-100"):
        ck.verify_checkpoint(folder / "step-100")
    warnings = []
    assert ck.usable_checkpoint(folder, warnings.append) == folder / "step-10"
    assert len(warnings) == 1 and "step-100" in warnings[0]


def test_all_damaged_is_an_error_and_none_is_none(folder, tmp_path):
    for step in (5, 10, 100):
        DAMAGE["flipped weights"](folder / f"step-{step}")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        ck.usable_checkpoint(folder, lambda _: None)
    assert ck.usable_checkpoint(tmp_path / "empty", lambda _: None) is None


def test_a_preferred_step_comes_first(folder):
    assert ck.usable_checkpoint(folder, lambda _: None, first=5) == folder / "step-5"
    DAMAGE["truncated"](folder / "step-5")
    assert ck.usable_checkpoint(folder, lambda _: None, first=5) == folder / "step-100"


def test_what_one_rank_finds_damaged_every_rank_names(folder):
    class Other(Ranks):  # each reads a share of the files
        def gather(self, mine):
            return [mine, "checkpoint step-5 is damaged: model-00002-of-00002.safetensors is missing"]

    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        ck.verify_checkpoint(folder / "step-5", Other())


def test_ranks_take_the_one_that_the_first_of_them_sees(folder):
    """On a shared disk another machine may see a newer one first, or a deleted one still."""

    class Other(Ranks):
        def gather(self, mine):
            return [{10: folder / "step-10"} if isinstance(mine, dict) else mine, mine]

    assert ck.usable_checkpoint(folder, lambda _: None, ranks=Other()) == folder / "step-10"


def test_pruning_keeps_the_newest_and_those_asked_for(folder):
    ck.prune_checkpoints(folder, 1, (None, 5))
    assert list(ck.list_checkpoints(folder)) == [5, 100]


def test_nothing_is_pickled(folder):
    names = {path.name for path in (folder / "step-5").iterdir()}
    assert names == {"model.safetensors", "training.safetensors", "state.json", "manifest.json"}


def test_only_what_the_manifest_names_is_read(folder):
    """As of a conversion that was broken off, or of a copy."""
    path = folder / "step-100"
    for part in ("model", "training", "average"):
        save_file({"0.weight": torch.ones(5, 6)}, path / f"{part}-00001-of-00001.safetensors")
    ck.verify_checkpoint(path)
    model, optimizer = trained(seed=1, steps=0)
    ck.load_model(path, model, averaged=True)
    assert ck.load_training(path, model, optimizer).step == 100
    assert torch.equal(model[0].weight, trained()[0][0].weight) and ck.load_average(path, {}) == {}


NUMBERS = {
    "no JSON": "{",
    "too deep": "[" * 200_000,
    "a list": [],
    "no optimizer": {"step": 3},
    "unknown": {"step": 3, "optimizer": {}, "zzz": 1},
    "step of text": {"step": "x", "optimizer": {}},
    "step below 0": {"step": -5, "optimizer": {}},
    "row of numbers": {"step": 3, "optimizer": {}, "row": [1, 2]},
    "losses of text": {"step": 3, "optimizer": {}, "recent_losses": ["a"]},
    "state of nothing": {"step": 3, "optimizer": {"foo": 1}},
    "state of another parameter": {"step": 3, "optimizer": {"optimizer.nope:k": 1}},
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_are_none_are_an_error(folder, kind):
    text = NUMBERS[kind] if isinstance(NUMBERS[kind], str) else json.dumps(NUMBERS[kind])
    (folder / "step-100" / "state.json").write_text(text)
    model, optimizer = trained(seed=1, steps=0)
    with pytest.raises(CheckpointError, match="step-100"):
        ck.load_training(folder / "step-100", model, optimizer)


@pytest.mark.parametrize("name", ["foo", "optimizer.nope:exp_avg"])
def test_a_state_of_no_parameter_is_an_error(folder, name):
    path = folder / "step-100" / "training.safetensors"
    save_file({**load_file(path), name: torch.ones(2)}, path)
    model, optimizer = trained(seed=1, steps=0)
    with pytest.raises(CheckpointError, match="of no parameter here"):
        ck.load_training(folder / "step-100", model, optimizer)


def test_format_1_is_read(folder):
    """It had random generators among the training state."""
    path = folder / "step-100"
    tensors = load_file(path / "training.safetensors")
    save_file({**tensors, "rng.cpu": torch.get_rng_state()}, path / "training.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / "training.safetensors"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    ck.verify_checkpoint(path)
    other, empty = trained(seed=1, steps=0)
    ck.load_model(path, other)
    assert ck.load_training(path, other, empty).step == 100
    assert len(empty.state_dict()["state"]) == len(list(other.parameters()))
