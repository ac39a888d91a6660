"""OpenAI's checkpoints against numbers recorded with OpenAI's own code; numbered steps between their neighbours."""

import numpy as np
import pytest
import torch

from quintic.core import CheckpointError, ConfigError
from quintic.core.counter_rng import Stream
from quintic.diffusion import Denoiser, load_denoiser
from quintic.diffusion.openai import OpenAIFlags, _UNet, named_betas
from quintic.diffusion.stepwise import StepwiseDenoiser

# OpenAI


def filled(network):
    """Weights as a function of their names alone, so that they can be made elsewhere too."""
    state = network.state_dict()
    for name, value in state.items():
        scale = 0.5 if value.ndim == 1 else value[0].numel() ** -0.5
        value.copy_(torch.from_numpy(Stream(0, "fill", name).normal(0, value.numel())).view(value.shape) * scale)
    return state


# Six values of the predicted clean image, from guided_diffusion's own p_mean_variance with the weights of ``filled``.
RECORDED = {
    "learned variance, cosine, 4000 steps": (
        {"num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8", "num_heads": 2, "learn_sigma": True,
         "noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True},
        (-0.667934, -0.147145, -0.184565, 0.081990, 0.208885, 0.066088),
    ),
    "resizing blocks, new attention": (
        {"num_res_blocks": 2, "channel_mult": "1,1,2", "attention_resolutions": "8,4", "num_head_channels": 16,
         "resblock_updown": True, "use_new_attention_order": True},
        (-0.917202, -0.284702, -0.223128, 0.912723, 1.363185, 1.290962),
    ),
    "no scale, predicts the image": (
        {"num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "16,8", "num_heads": 4,
         "use_scale_shift_norm": False, "predict_xstart": True},
        (0.802371, 1.306182, 1.591043, 0.039151, -0.510522, -0.222349),
    ),
    "classes": (
        {"num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4", "class_cond": True},
        (-0.925272, -0.468430, -0.382520, 0.163714, 0.441818, -1.070243),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_openai_networks_say_what_their_own_code_says(name, tmp_path):
    changes, expected = RECORDED[name]
    flags = {"image_size": 16, "num_channels": 32, **changes}
    classes = 1000 if flags.get("class_cond") else 0
    torch.save(filled(_UNet(3, classes, OpenAIFlags(**flags))), tmp_path / "model.pt")
    model = load_denoiser(tmp_path / "model.pt", **flags)
    assert isinstance(model, Denoiser) and isinstance(model, StepwiseDenoiser)
    steps = flags.get("diffusion_steps", 1000)
    levels = torch.tensor([model.log_snr[::-1][step] for step in (steps // 10, steps // 2)], dtype=torch.float64)
    x = torch.from_numpy(Stream(1, "x").normal(0, 2 * 3 * 256)).float().view(2, 3, 16, 16)
    x0 = model.predict_x0(x, levels, torch.tensor([3, 5]) if classes else None)
    found = [*x0[0, 0, 0, :3].tolist(), *x0[1, 2, 5, :3].tolist()]
    assert found == pytest.approx(expected, abs=2e-5)


def test_heads_of_the_way_up_may_be_others():
    flags = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "16", "num_heads": 2}
    network = _UNet(3, 0, OpenAIFlags(**flags, num_heads_upsample=4))
    down, middle, up = (
        [layer.heads for layer in part.modules() if hasattr(layer, "heads")]
        for part in (network.input_blocks, network.middle_block, network.output_blocks)
    )
    assert set(down) == set(middle) == {2} and set(up) == {4}
    same = _UNet(3, 0, OpenAIFlags(**flags))
    assert {layer.heads for layer in same.modules() if hasattr(layer, "heads")} == {2}


def test_named_betas_are_those_of_the_papers():
    linear = named_betas("linear", 1000)
    assert (linear[0], linear[-1]) == pytest.approx((1e-4, 0.02))
    assert named_betas("linear", 4000)[[0, -1]] == pytest.approx((2.5e-5, 0.005))  # as much noise in all
    cosine = np.cumprod(1 - named_betas("cosine", 4000))
    # The products telescope to the cosine itself, until beta is cut at 0.999.
    for t in (0.1, 0.5, 0.9):
        wanted = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        assert cosine[round(t * 4000) - 1] == pytest.approx(wanted, rel=1e-9)


def test_openai_mistakes_are_named(tmp_path):
    flags = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    file = tmp_path / "model.pt"
    torch.save(_UNet(3, 0, OpenAIFlags(**flags)).state_dict(), file)
    with pytest.raises(ConfigError, match="did you mean 'num_res_blocks'"):
        load_denoiser(file, **flags, num_resblocks=1)
    with pytest.raises(CheckpointError, match="does not fit these flags"):
        load_denoiser(file, **(flags | {"num_res_blocks": 2}))
    with pytest.raises(ConfigError, match="need channel_mult"):
        load_denoiser(file, image_size=16)
    with pytest.raises(CheckpointError, match="not a model of these repositories"):
        torch.save({"weight": torch.zeros(2)}, file)
        load_denoiser(file, **flags)
    file.write_bytes(b"no state dict")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_denoiser(file, **flags)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_denoiser(tmp_path / "model.pt", image_size=32)
    assert not (tmp_path / "ran").exists()


# Numbered steps


def test_fractional_steps_lie_between_their_neighbours():
    abar = np.cumprod(1 - named_betas("linear", 1000))
    seen = []

    def predict(x, step, labels):
        seen.append(step.clone())
        return torch.zeros_like(x)

    model = StepwiseDenoiser(predict, abar, "eps", (1, 2, 2), "print")
    levels = np.log(abar / (1 - abar))
    between = 0.25 * levels[300] + 0.75 * levels[301]
    model.predict_x0(torch.zeros(4, 1, 2, 2), torch.tensor([levels[300], between, 50.0, -50.0]))
    assert seen[0].tolist() == pytest.approx([300.0, 300.75, 0.0, 999.0], abs=1e-3)
    steps = np.arange(len(abar))
    assert np.abs(model.step(torch.from_numpy(levels)).numpy() - steps).max() < 1e-6  # in float64: 1e-3 in float32


@pytest.mark.parametrize("abar", [[0.9], [0.5, 0.9], [0.9, 0.9, 0.5], [[0.9, 0.5]]])
def test_products_that_do_not_fall_are_no_schedule(abar):
    with pytest.raises(CheckpointError, match="must fall"):
        StepwiseDenoiser(lambda x, step, labels: x, np.array(abar), "eps", (1, 2, 2), "print")
