"""The task as the loop uses it: losses with a known value, validation that depends on weights alone, a whole run."""

import io
import math
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from quintic.assets import preset_names, preset_text
from quintic.core import ConfigError, DataError
from quintic.core.counter_rng import Stream
from quintic.data.images import ImageConfig, as_pixels, image_grid, prepare_images
from quintic.diffusion import DDPMConfig, Denoiser, UNet
from quintic.diffusion.task import DDPMTask, derived_fields, unet_arguments
from quintic.engine import EngineConfig, Run, Settings
from quintic.engine.loop import train
from quintic.optim import OptimConfig

TYPES = {"ddpm": DDPMConfig, "data": ImageConfig, "optim": OptimConfig, "engine": EngineConfig}
SMALL = DDPMConfig(width=8, levels=2, blocks=1, heads=2, sample_images=4, sample_steps=3)


def small_task(config=SMALL, **data):
    images = prepare_images(None, ImageConfig(**({"size": 8, "drawn": 40, "validation_fraction": 0.3} | data)))
    fields = {name: value for name, (value, _) in derived_fields(config, images).items()}
    return DDPMTask(replace(config, **fields), images)


def test_sizes_follow_the_images():
    task = small_task(replace(SMALL, classes=-1), channels="rgb")
    assert unet_arguments(task.config)["shape"] == (3, 8, 8)
    assert task.config.classes == 10
    assert task.build(0).num_classes == 10


@pytest.mark.parametrize("target", ["v", "eps", "x0"])
def test_a_network_that_says_zero_has_the_loss_of_the_target(target):
    """E v^2 = alpha^2 E eps^2 + sigma^2 E x_0^2; a fresh U-Net says zero."""
    task = small_task(replace(SMALL, target=target), drawn=400)
    batch = task.batch(np.arange(400))
    torch.manual_seed(0)
    loss = task.loss(task.build(0), batch)
    assert loss.count == 400 * 64
    power = float(batch["images"].square().mean())
    signal = np.mean([1 / (1 + math.exp(-task.schedule.log_snr((i + 0.5) / 400))) for i in range(400)])
    expected = {"eps": 1.0, "x0": power, "v": signal + (1 - signal) * power}[target]
    assert float(loss.total.detach()) / loss.count == pytest.approx(expected, rel=0.03)


def test_a_step_depends_on_the_generator_and_nothing_else():
    task = small_task()
    model, batch = task.build(0), task.batch(np.arange(8))
    with torch.no_grad():
        model.leave.weight.fill_(0.1)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch).total.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_classes_reach_the_network_and_are_withheld_sometimes():
    task = small_task(replace(SMALL, classes=-1, class_dropout=0.2), drawn=200)
    seen = []

    class Spy(UNet):
        def forward(self, x, log_snr, labels=None):
            seen.append(labels)
            return super().forward(x, log_snr, labels)

    spy = Spy(**unet_arguments(task.config))
    torch.manual_seed(0)
    batch = task.batch(np.arange(200))
    task.loss(spy, batch)
    withheld = seen[0] == 10
    assert 20 < int(withheld.sum()) < 65
    assert torch.equal(seen[0][~withheld], batch["labels"][~withheld])


def test_levels_of_a_batch_are_one_in_each_equal_part_of_the_time():
    task, seen = small_task(replace(SMALL, shift=0.5), drawn=100), []
    spy = UNet(**unet_arguments(task.config), seed=0)
    spy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    task.loss(spy, task.batch(np.arange(64)))
    times = sorted(task.schedule.time(float(level)) for level in seen[0])
    schedule = task.schedule
    assert (schedule.minimum, schedule.maximum, schedule.shift) == (SMALL.log_snr_min, SMALL.log_snr_max, 0.5)
    for part, time in enumerate(times):
        low, high = (schedule.time(schedule.log_snr(edge / 64)) for edge in (part, part + 1))
        assert low - 1e-5 <= time <= high + 1e-5
    assert not torch.equal(seen[0], seen[0].sort().values)  # and in no order


def test_validation_noise_levels_and_classes_belong_to_the_image():
    task = small_task(replace(SMALL, classes=-1), drawn=60)
    model = task.build(0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        batch = task.batch(np.arange(7))
        noise = Stream(0, "noise of a test")
        whole = task.evaluation_loss(model, batch, noise, 10)
        parts = [
            task.evaluation_loss(model, {name: value[part] for name, value in batch.items()}, noise, 10 + part.start)
            for part in (slice(0, 3), slice(3, 7))
        ]
        assert sum(part.total for part in parts).item() == pytest.approx(whole.total.item(), rel=1e-6)
        assert sum(part.count for part in parts) == whole.count
        shuffled = batch | {"labels": batch["labels"].roll(1)}
        assert task.evaluation_loss(model, shuffled, noise, 10).total.item() != pytest.approx(
            whole.total.item(), rel=1e-5
        )


def test_validation_is_a_function_of_the_weights():
    task = small_task()
    model = task.build(0).train()
    first = task.evaluate(model, "validation")
    torch.manual_seed(99)
    assert task.evaluate(model, "validation") == first
    assert model.training
    assert set(first) == {"val_loss"} and set(task.evaluate(model, "test")) == {"test_loss"}
    with torch.no_grad():
        model.leave.bias.fill_(0.5)
    assert task.evaluate(model, "validation") != first
    assert task.evaluate(model, "validation", should_stop=lambda: True) is None
    assert small_task(validation_fraction=0.0).evaluate(model, "validation") == {}


def test_a_sample_leaves_the_model_as_it_was(tmp_path):
    task = small_task(replace(SMALL, dropout=0.5))
    model = task.build(0).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # else nothing that dropout reaches matters
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    assert isinstance(task.denoiser(model), Denoiser)
    for name in ("one", "two"):
        task.sample(model, tmp_path / name, 0, lambda: False)
    assert model.training and all(p.requires_grad for p in model.parameters())
    # In evaluation mode, or dropout would make them differ.
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert task.sample(model, tmp_path / "three", 0, lambda: True) == ""
    asked = []
    assert task.sample(model, tmp_path / "three", 0, lambda: asked.append(1) or len(asked) > 2) == ""  # midway, too
    assert not (tmp_path / "three.png").exists()
    assert not torch.equal(*(model(torch.ones(1, 1, 8, 8), torch.zeros(1)) for _ in range(2)))  # dropout reaches it


def test_double_precision_weights():
    task = small_task()
    model = task.build(0).double()
    loss = task.loss(model, task.batch(np.arange(4)))
    assert loss.total.dtype == torch.float64
    assert task.denoiser(model).predict_x0(torch.zeros(1, 1, 8, 8), 0.0).dtype == torch.float32


def test_flops_are_three_times_the_multiplications_of_a_forward():
    """With one level, no attention and one block: the convolutions and matrices can be counted by hand."""
    task = small_task(replace(SMALL, levels=1, heads=0, patch=1, width=8))
    pixels, w, d = 64, 8, 32
    convolutions = (
        pixels * 9 * (1 * w)  # enter
        + 2 * pixels * 9 * (w * w + w * w)  # a block down, one in the middle
        + pixels * 9 * (2 * w * w + w * w) + pixels * 2 * w * w  # a block up, with its skip
        + pixels * 9 * w * 1  # leave
    )  # fmt: skip
    matrices = 32 * d + d * d + 3 * d * 2 * w
    assert task.flops_per_example(task.build(0)) == 3 * 2 * (convolutions + matrices)


def test_mistakes_are_named(tmp_path):
    task = small_task()
    with pytest.raises(DataError, match=r"\(1, 8, 8\), the model is for \(3, 8, 8\)"):
        DDPMTask(replace(task.config, channels=3), task.data)
    with pytest.raises(DataError, match="for 3 classes, the images have 10"):
        DDPMTask(replace(task.config, classes=3), task.data)
    for i in range(9):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="no labels"):
        derived_fields(DDPMConfig(classes=-1), prepare_images([tmp_path], ImageConfig()))
    for wrong, words in (
        ({"target": "noise"}, "ddpm.target"),
        ({"width": 4}, "ddpm.width"),
        ({"dropout": 1.0}, "ddpm.dropout"),
        ({"log_snr_min": 5.0, "log_snr_max": 5.0}, "log_snr_min"),
    ):
        with pytest.raises(ConfigError, match=words):
            DDPMConfig(**wrong)


@pytest.mark.parametrize("name", preset_names("ddpm"))
def test_presets_are_settings_that_exist(name):
    settings = Settings.build(TYPES, tomllib.loads(preset_text("ddpm", name)), name, [])
    assert settings["engine"].ema_decay > 0
    with torch.device("meta"):
        shape = (3 if name.startswith("emoji") else 1, settings["data"].size or 28, settings["data"].size or 28)
        UNet(**(unet_arguments(settings["ddpm"]) | {"shape": shape, "num_classes": 0}), initialize=False)


def test_a_run_learns_samples_and_resumes_exactly(tmp_path):
    def run(folder, steps):
        images = prepare_images(None, ImageConfig(size=8, drawn=200))
        overrides = ["engine.steps=30", "engine.batch_size=16", "engine.checkpoint_every=10", "optim.lr=0.01",
                     "engine.ema_decay=0.8", "engine.device=cpu", "engine.diagnose_every=0"]  # fmt: skip
        preset = {"ddpm": {"width": 8, "levels": 2, "blocks": 1, "heads": 2, "sample_images": 4, "sample_steps": 3}}
        settings = Settings.build(TYPES, preset, "test", overrides)
        for name, (value, why) in derived_fields(settings["ddpm"], images).items():
            settings = settings.derive(f"ddpm.{name}", value, why)
        task = DDPMTask(settings["ddpm"], images)
        header = {"task": "ddpm", "size": "test", "paths": [], "fingerprint": task.fingerprint}
        opened = Run.open(folder) if folder.exists() else Run.create(folder, settings, header)
        console = Console(file=io.StringIO())
        return task, train(task, settings, opened, console, quiet_peak=True, stop_at=steps)

    task, whole = run(tmp_path / "whole", None)
    assert whole.finished
    assert whole.row["val_loss"] < 0.85 * task.evaluate(task.build(0), "validation")["val_loss"]
    sheet = Image.open(tmp_path / "whole" / "samples" / "step-000030.png")
    assert sheet.size == (512, 512) and "4 images" in whole.sample
    run(tmp_path / "parts", 13)
    _, parts = run(tmp_path / "parts", None)
    assert parts.row["val_loss"] == whole.row["val_loss"]


def test_a_grid_shows_every_image():
    images = as_pixels(np.linspace(-1, 1, 5 * 3 * 4 * 4, dtype=np.float32).reshape(5, 3, 4, 4))
    sheet = np.asarray(image_grid(images, smallest=1))
    assert sheet.shape == (8, 12, 3)
    assert (sheet[:4, 4:8] == images[1]).all() and (sheet[4:, 4:8] == images[4]).all()
    assert (sheet[4:, 8:] == 255).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_is_drawn_without_dropout_and_leaves_the_model_in_its_mode(training):
    task = small_task(replace(SMALL, dropout=0.5))
    model = task.build(0).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    first, second = (task.draw(model, 0, lambda: None) for _ in range(2))
    assert torch.equal(first, second) and model.training == training
