"""The way between two latents: its ends, its length and where it may not pass."""

import pytest
import torch

from quintic.flow.samples import great_circle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_are_evenly_spaced_in_angle(dtype):
    a, b = torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([-1.5, 1.5 * 3**0.5], dtype=dtype)  # 120 degrees apart
    angles = torch.deg2rad(torch.arange(5, dtype=dtype) * 30)
    expected = 3.0 * torch.stack([angles.cos(), angles.sin()], 1)
    assert torch.allclose(great_circle(a, b, 5), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("off", [0.0, 1e-7])
def test_between_opposite_latents_the_way_is_no_shorter_than_they_are(dtype, off):
    generator = torch.Generator().manual_seed(0)
    a, other = torch.randn(2, 1, 28, 28, generator=generator, dtype=torch.float64).to(dtype)
    b = -a + off * other
    found = great_circle(a, b, 9)
    assert torch.allclose(found[0], a, atol=1e-5) and torch.allclose(found[-1], b, atol=1e-5)
    lengths = found.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, a.norm().expand(9), rtol=1e-5)
    cosines = (found[1:] * found[:-1]).flatten(1).sum(1) / a.square().sum()
    assert (torch.rad2deg(cosines.arccos()) - 180 / 8).abs().max() < 0.01
    assert found[4].std() > 0.2 * found[4].abs().max()  # and no latent that lies in a few numbers alone
    assert torch.equal(found, great_circle(a, b, 9))
    assert great_circle(a, 2 * b, 9).flatten(1).norm(dim=1).min() > 0.999 * a.norm()


def test_where_there_is_no_angle_the_way_is_straight():
    a = torch.tensor([1.0, 2.0])
    assert torch.allclose(great_circle(a, 3 * a, 3), torch.stack([a, 2 * a, 3 * a]))
    assert torch.allclose(great_circle(0 * a, a, 3), torch.stack([0 * a, 0.5 * a, a]))
    assert great_circle(torch.tensor([1.0]), torch.tensor([-1.0]), 3).flatten().tolist() == [1.0, 0.0, -1.0]
