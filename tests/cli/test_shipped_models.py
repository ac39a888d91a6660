"""Models that come with the package, by name, wherever a run's model would do."""

import numpy as np
import pytest
from PIL import Image
from tests.cli.command import quintic

from quintic.cli.wiring import build_settings, shipped_models
from quintic.data.images import as_pixels
from quintic.diffusion import NoiseSchedule, ddim_sample, shipped_denoiser
from quintic.diffusion.samplers import seeded_noise


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", shipped_models())
def test_every_one_generates_without_a_run(name, here):
    assert quintic("generate", name, "--n", "2", "--seed", "5") == 0
    made = here / f"{name.replace('/', '-')}-seed5.npy"
    images = np.load(made)
    assert images.dtype == np.uint8 and len(images) == 2 and images.std() > 20
    assert made.with_suffix(".png").is_file()
    assert len(list(here.iterdir())) == 2  # and nothing else is left


def test_images_are_those_of_the_library(here):
    assert (
        quintic("generate", "ddpm/fashion28", "--n", "3", "--steps", "7", "--out", "a.png", "--dtype", "float32") == 0
    )
    denoiser, c = shipped_denoiser("fashion28"), build_settings("ddpm", "fashion28", [])["ddpm"]
    levels = NoiseSchedule(c.schedule, c.log_snr_min, c.log_snr_max, c.shift).grid(7)
    expected = ddim_sample(denoiser, 3, levels, noise=seeded_noise(0, 3, denoiser.shape, 0))
    difference = np.load("a.npy").astype(int) - as_pixels(expected.numpy()).astype(int)
    assert abs(difference).max() <= 1


def test_evaluation_wants_images(here, capsys):
    rng = np.random.default_rng(0)
    (here / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(here / "pictures" / f"{i}.png")
    assert quintic("evaluate", "ddpm/fashion28", "pictures") == 0
    told = capsys.readouterr().out
    assert "3 images: loss" in told and "(mean squared error)" in told


def test_a_folder_of_that_name_is_a_run(here, capsys):
    (here / "ddpm" / "fashion28").mkdir(parents=True)
    assert quintic("generate", "ddpm/fashion28") == 2
    assert "holds no run" in capsys.readouterr().err


def test_errors_name_what_there_is(here, capsys):
    assert quintic("evaluate", "ddpm/fashion28") == 2
    assert "comes without its images" in capsys.readouterr().err
    for slip in ("ddpm/fashion", "fashion28", "dppm/fashion28"):
        assert quintic("generate", slip) == 2
        assert "did you mean 'ddpm/fashion28'" in " ".join(capsys.readouterr().err.split())
    assert quintic("generate", "runs/nowhere") == 2
    assert "give the folder that quintic train printed" in " ".join(capsys.readouterr().err.split())
