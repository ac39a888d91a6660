"""Targets are rotations of each other; a network's file gives back the network."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintic.core import CheckpointError, ConfigError, MissingExtraError
from quintic.diffusion import Denoiser, NetworkDenoiser, UNet, alpha_sigma, load_denoiser
from quintic.diffusion.network import TARGETS, make_target, x0_from_target

ARGUMENTS = {"shape": (1, 8, 12), "width": 8, "levels": 2, "blocks": 1, "patch": 2, "heads": 2}


def network(seed=0, **changes):
    net = UNet(**(ARGUMENTS | changes), seed=seed)
    with torch.no_grad():
        net.leave.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return net


@settings(deadline=None)
@given(st.sampled_from(TARGETS), st.floats(-6, 6))
def test_the_true_target_gives_the_true_image(target, level):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = torch.full((2,), level, dtype=torch.float64)
    alpha, sigma = alpha_sigma(levels, x0)
    x = alpha * x0 + sigma * eps
    predicted = make_target(target, x0, eps, levels)
    torch.testing.assert_close(x0_from_target(target, x, predicted, levels), x0)


def test_v_has_the_variance_of_the_data_and_noise_at_both_ends():
    """v is eps where there is no noise and -x_0 where there is nothing else."""
    x0, eps = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 5.0)
    assert float(make_target("v", x0, eps, torch.tensor([50.0]))) == pytest.approx(5.0)
    assert float(make_target("v", x0, eps, torch.tensor([-50.0]))) == pytest.approx(-3.0)


@pytest.mark.parametrize("target", TARGETS)
def test_prediction_is_the_formula_applied_to_the_network(target):
    net = network()
    denoiser = NetworkDenoiser(net, target, ARGUMENTS)
    assert isinstance(denoiser, Denoiser) and denoiser.shape == (1, 8, 12)
    x, level = torch.randn(2, 1, 8, 12), torch.tensor([0.5, -1.0])
    said = net(x, level)
    alpha, sigma = alpha_sigma(level, x)
    expected = {"x0": said, "eps": (x - sigma * said) / alpha, "v": alpha * x - sigma * said}[target]
    torch.testing.assert_close(denoiser.predict_x0(x, level), expected)
    torch.testing.assert_close(denoiser.predict_x0(x[:1], 0.5), expected[:1], rtol=1e-4, atol=1e-5)


def test_a_file_gives_back_the_rounded_network(tmp_path):
    denoiser = NetworkDenoiser(network(num_classes=2), "v", ARGUMENTS | {"num_classes": 2})
    file = tmp_path / "net.safetensors"
    denoiser.save(file, licence="none")
    again = load_denoiser(file)
    assert again.fingerprint == load_denoiser(file).fingerprint
    assert again.num_classes == 2 and again.shape == (1, 8, 12)
    x = torch.randn(1, 1, 8, 12)
    torch.testing.assert_close(again.predict_x0(x, 1.0), denoiser.predict_x0(x, 1.0), rtol=0.01, atol=0.01)
    # Half precision is kept exactly by a second round.
    again.save(tmp_path / "second.safetensors")
    second = load_denoiser(tmp_path / "second.safetensors")
    assert torch.equal(second.predict_x0(x, 1.0), again.predict_x0(x, 1.0))
    assert second.fingerprint == again.fingerprint


def test_a_network_from_a_file_is_for_use_and_not_for_training(tmp_path):
    arguments = ARGUMENTS | {"dropout": 0.5}
    NetworkDenoiser(network(dropout=0.5), "v", arguments).save(tmp_path / "net.safetensors")
    again = load_denoiser(tmp_path / "net.safetensors")
    x = torch.randn(1, 1, 8, 12)
    assert torch.equal(again.predict_x0(x, 1.0), again.predict_x0(x, 1.0))
    assert not any(parameter.requires_grad for parameter in again.network.parameters())


def test_a_denoiser_tells_what_it_is_for():
    network = UNet((1, 4, 4), width=8, levels=1, heads=0, initialize=False)
    count = sum(p.numel() for p in network.parameters())
    shown = f"NetworkDenoiser(shape=(1, 4, 4), target='v', {count:,} parameters)"
    assert repr(NetworkDenoiser(network, "v", {})) == shown


def test_fingerprints_tell_weights_and_targets_apart():
    prints = {
        NetworkDenoiser(network(0), "v", ARGUMENTS).fingerprint,
        NetworkDenoiser(network(1), "v", ARGUMENTS).fingerprint,
        NetworkDenoiser(network(0), "eps", ARGUMENTS).fingerprint,
    }
    assert len(prints) == 3
    assert NetworkDenoiser(network(0), "v", ARGUMENTS).fingerprint in prints


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="unknown target 'velocity'"):
        NetworkDenoiser(network(), "velocity", ARGUMENTS)
    with pytest.raises(ConfigError, match=r"\(b, 1, 8, 12\)"):
        NetworkDenoiser(network(), "v", ARGUMENTS).predict_x0(torch.zeros(1, 8, 12), 0.0)
    file = tmp_path / "net.safetensors"
    NetworkDenoiser(network(), "v", ARGUMENTS).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_denoiser(file)
    with pytest.raises(CheckpointError, match="no such file"):
        load_denoiser(tmp_path / "nowhere")
    file.write_bytes(whole)
    with pytest.raises(ConfigError, match="takes no options, found heads"):
        load_denoiser(file, heads=3)


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"quintic\[interop\]"):
        load_denoiser(tmp_path)
