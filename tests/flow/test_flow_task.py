"""The training task, seen as the engine sees it."""

import math
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image

from quintic.assets import preset_names, preset_text
from quintic.core import ConfigError, DataError
from quintic.core.machine import autocast
from quintic.data.images import ImageConfig, ImageData, ImageSplit, prepare_images
from quintic.engine.config import EngineConfig, Settings
from quintic.flow import TarFlow, TarFlowConfig
from quintic.flow.task import TarFlowTask, derived_fields
from quintic.optim.config import OptimConfig, build_optimizer

SMALL = {"patch": 4, "width": 16, "blocks": 2, "layers": 1, "head_width": 8, "sample_images": 5}


def never():
    return False


@pytest.fixture(scope="module")
def drawn():
    return prepare_images(None, ImageConfig(size=8, drawn=200))


def make_task(data, **options):
    config = TarFlowConfig(**{**SMALL, **options})
    fields = {name: value for name, (value, _) in derived_fields(config, data).items()}
    return TarFlowTask(TarFlowConfig(**{**SMALL, **options, **fields}), data)


def test_the_loss_is_minus_the_log_density_of_noisy_images(drawn):
    task = make_task(drawn)
    model = task.build(0)  # the identity: a standard normal
    batch = task.batch(np.arange(50))
    assert batch["images"].shape == (50, 1, 8, 8)
    torch.manual_seed(1)
    found = task.loss(model, batch)
    torch.manual_seed(1)
    x = batch["images"] / 127.5 - 1 + 0.1 * torch.randn(50, 1, 8, 8)
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(x).sum()
    assert found.count == 50 * 64
    assert float(found.total.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert task.step_metrics(1.0) == {}


@pytest.mark.parametrize("preprocess", ["scale", "logit"])
def test_with_uniform_noise_the_loss_is_bits_per_dim(drawn, preprocess):
    task = make_task(drawn, noise="uniform", preprocess=preprocess)
    model = task.build(0)
    batch = task.batch(np.arange(50))
    found = task.loss(model, batch)
    bits = task.step_metrics(float(found.total.detach()) / found.count)["bits_per_dim"]
    with torch.no_grad():
        expected = model.bits_per_dim(batch["images"], samples=1).mean()
    assert bits == pytest.approx(float(expected), rel=0.01)
    values = task.evaluate(model, "test")
    assert values["test_bits_per_dim"] == pytest.approx((values["test_loss"] + math.log(128)) / math.log(2))


def test_evaluation_is_a_function_of_the_weights_alone(drawn):
    task = make_task(drawn, classes=-1)
    model = task.build(0).train()
    torch.manual_seed(0)
    first = task.evaluate(model, "validation")
    torch.manual_seed(1)
    assert task.evaluate(model, "validation") == first
    assert model.training
    assert set(first) == {"val_loss"}
    assert task.evaluate(model, "test", lambda: True) is None


def test_evaluation_is_exact_whatever_autocast_says(drawn):
    task = make_task(drawn, noise="uniform")
    model = task.build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    exact = task.evaluate(model, "test")
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert task.evaluate(model, "test") == exact


def test_labels_are_withheld_at_the_rate_asked_for(drawn, monkeypatch):
    task = make_task(drawn, classes=-1, class_dropout=0.25)
    model = task.build(0)
    seen = []

    def log_prob(images, labels):
        seen.append(labels)
        return images.sum((1, 2, 3))

    monkeypatch.setattr(model, "log_prob", log_prob)
    batch = task.batch(np.arange(200))
    torch.manual_seed(0)
    for _ in range(20):
        task.loss(model, batch)
    labels = torch.cat(seen)
    assert float((labels == -1).float().mean()) == pytest.approx(0.25, abs=0.03)
    kept = labels != -1
    assert torch.equal(labels[kept], batch["labels"].repeat(20)[kept])
    task.evaluate(model, "test")
    assert (seen[-1] >= 0).all()  # measured with their classes


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("muon", torch.float32), ("adamw", torch.float32), ("muon", torch.bfloat16)]
)
def test_training_lowers_the_loss(drawn, optimizer, dtype):
    task = make_task(drawn, classes=-1)
    model = task.build(0)
    optim = build_optimizer(model, OptimConfig(name=optimizer, lr=0.01))
    before = task.evaluate(model, "test")["test_loss"]
    torch.manual_seed(0)
    for step in range(30):
        optim.zero_grad()
        with autocast(torch.device("cpu"), dtype):
            loss = task.loss(model, task.batch(np.arange(step * 32, step * 32 + 32) % 200))
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
    assert task.evaluate(model, "test")["test_loss"] < before - 0.2


def test_muon_gets_the_matrices_of_the_transformers():
    from quintic.optim.routing import roles

    rows = {row.name: row for row in roles(TarFlow((1, 8, 8), patch=4, num_classes=2)).rows}
    by_muon = {name for name, row in rows.items() if row.algorithm == "muon"}
    expected = {name for name in rows if name.endswith((".qkv.weight", ".mix.weight", ".up.weight", ".down.weight"))}
    assert by_muon == expected


def test_a_sample_is_a_picture(drawn, tmp_path):
    task = make_task(drawn, classes=-1, guidance=1.0)
    words = task.sample(task.build(0), tmp_path / "step-1", 0, never)
    picture = Image.open(tmp_path / "step-1.png")
    assert picture.mode == "L"
    assert picture.width % 24 == 0
    assert picture.height % 16 == 0
    assert "5 images" in words
    assert task.sample(task.build(0), tmp_path / "step-2", 0, lambda: True) == ""
    assert not (tmp_path / "step-2.png").exists()


def test_weights_that_give_no_images_yet_do_not_end_a_training(drawn, tmp_path):
    task = make_task(drawn)
    model = task.build(0)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    assert task.sample(model, tmp_path / "step-1", 0, never).startswith("no sample: images were not finite in 4 draws")
    assert not list(tmp_path.iterdir())


def test_what_follows_from_the_data(drawn):
    found = derived_fields(TarFlowConfig(classes=-1), drawn)
    assert {name: value for name, (value, _) in found.items()} == {
        "channels": 1,
        "height": 8,
        "image_width": 8,
        "classes": 10,
    }
    with pytest.raises(ConfigError, match=r"tarflow.patch.*possible: \[1, 2, 4, 8\]"):
        derived_fields(TarFlowConfig(patch=3), drawn)
    split = ImageSplit(np.zeros((4, 8, 8, 1), np.uint8), None)
    unlabelled = ImageData(split, split, split, (), "x")
    with pytest.raises(DataError, match="no labels"):
        derived_fields(TarFlowConfig(classes=-1), unlabelled)
    config = TarFlowConfig(channels=3, height=8, image_width=8)
    with pytest.raises(DataError, match="the model is for"):
        TarFlowTask(config, drawn)


@pytest.mark.parametrize("name", preset_names("tarflow"))
def test_presets_make_models(name):
    types = {"tarflow": TarFlowConfig, "data": ImageConfig, "optim": OptimConfig, "engine": EngineConfig}
    settings = Settings.build(types, tomllib.loads(preset_text("tarflow", name)), name, [])
    data = prepare_images(None, ImageConfig(size=28 if name == "fashion28" else settings["data"].size, drawn=20))
    for key, (value, why) in derived_fields(settings["tarflow"], data).items():
        settings = settings.derive(f"tarflow.{key}", value, why)
    task = TarFlowTask(settings["tarflow"], data)
    lines, facts = task.describe()
    assert f"{facts['parameters_total']:,} parameters" in lines[-1]
    with torch.device("meta"):
        model = task.build(initialize=False)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters_total"] < 3_000_000
    assert task.flops_per_example(model) > 6 * model.tokens * facts["parameters_total"] * 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise", "gausian"), ("sigma", 0.0), ("patch", 0), ("class_dropout", 1.0), ("guidance", 1.0), ("direction", "x")],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"tarflow.{field}"):
        TarFlowConfig(**{field: value})


def test_guidance_needs_images_without_their_class():
    TarFlowConfig(classes=-1, guidance=1.0)
    with pytest.raises(ConfigError, match="learned without their class"):
        TarFlowConfig(classes=-1, guidance=1.0, class_dropout=0.0)
