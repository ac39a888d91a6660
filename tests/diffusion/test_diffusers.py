"""Folders of diffusers against diffusers itself."""

import json

import pytest
import torch

from quintic.core import CheckpointError, ConfigError
from quintic.diffusion import Denoiser, NoiseSchedule, ancestral_sample, load_denoiser

diffusers = pytest.importorskip("diffusers", reason="comes with the extra interop")


def tiny_pipeline(folder, prediction="epsilon", channels=3, size=8, classes=None, learned=False, **scheduler):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels * (2 if learned else 1), layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    steps = diffusers.DDPMScheduler(
        prediction_type=prediction, clip_sample=False, variance_type="learned_range" if learned else "fixed_small",
        **scheduler,
    )  # fmt: skip
    if classes:
        unet.save_pretrained(folder / "unet")
        steps.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    else:
        diffusers.DDPMPipeline(unet, steps).save_pretrained(folder)
    return unet.eval(), steps


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", [{}, {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}])
def test_a_pipeline_predicts_what_its_own_scheduler_says(tmp_path, prediction, scheduler):
    unet, steps = tiny_pipeline(tmp_path, prediction, **scheduler)
    model = load_denoiser(tmp_path)
    assert isinstance(model, Denoiser) and model.shape == (3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    for step in (3, 250, 480):
        with torch.no_grad():
            said = unet(x, step).sample
            expected = steps.step(said, step, x).pred_original_sample
        found = model.predict_x0(x, model.log_snr[::-1][step])
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_learned_variances_are_dropped(tmp_path):
    unet, steps = tiny_pipeline(tmp_path, learned=True)
    model = load_denoiser(tmp_path)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        eps = unet(x, 100).sample[:, :3]
    abar = float(steps.alphas_cumprod[100])
    torch.testing.assert_close(
        model.predict_x0(x, model.log_snr[::-1][100]), (x - (1 - abar) ** 0.5 * eps) / abar**0.5, rtol=1e-3, atol=1e-3
    )


def test_a_lone_model_needs_a_scheduler(tmp_path):
    tiny_pipeline(tmp_path, channels=1)
    with pytest.raises(CheckpointError, match=r"scheduler=folder"):
        load_denoiser(tmp_path / "unet")
    model = load_denoiser(tmp_path / "unet", scheduler=tmp_path / "scheduler")
    assert model.fingerprint == load_denoiser(tmp_path).fingerprint
    images = ancestral_sample(model, 2, NoiseSchedule("linear").grid(5))
    assert images.shape == (2, 1, 8, 8) and images.abs().max() <= 1


def test_classes_must_be_given(tmp_path):
    tiny_pipeline(tmp_path, classes=4)
    model = load_denoiser(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ConfigError, match="wants labels of 4 classes"):
        model.predict_x0(x, 0.0)
    one, two = (model.predict_x0(x, 0.0, torch.tensor([c, c])) for c in (0, 1))
    assert not torch.allclose(one, two)


def test_folders_that_are_no_denoiser_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match="holds a UNet2DConditionModel"):
        load_denoiser(tmp_path)
    tiny_pipeline(tmp_path / "p")
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="diffusers cannot read"):
        load_denoiser(tmp_path / "p")
    for part, name, change, words in (
        ("scheduler", "scheduler_config.json", {"prediction_type": "flow"}, "unknown prediction_type 'flow'"),
        ("unet", "config.json", {"sample_size": None}, "no sample_size"),
    ):
        tiny_pipeline(tmp_path / part)
        path = tmp_path / part / part / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(CheckpointError, match=words):
            load_denoiser(tmp_path / part)
    # Pickled weights are not opened, where diffusers alone would.
    unet, _ = tiny_pipeline(tmp_path / "pickled", size=(4, 8))
    assert load_denoiser(tmp_path / "pickled").shape == (3, 4, 8)
    (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="diffusers cannot read"):
        load_denoiser(tmp_path / "pickled")
