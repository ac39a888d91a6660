"""Filling in: the conditional distribution, where it is known."""

import pytest
import torch

from quintic.core import ConfigError, DataError
from quintic.flow import TarFlow, inpaint

F64 = torch.float64


def shifting_flow():
    """Two pixels: z0 = x0, z1 = x1 - tanh-like function of x0, so that x1 given x0 is N(mu(x0), 1)."""
    flow = TarFlow((1, 1, 2), patch=1, width=8, blocks=1, layers=1, head_width=8, noise="uniform", seed=3).double()
    with torch.no_grad():
        flow.stack[0].leave.weight[1].normal_(generator=torch.Generator().manual_seed(0))
        flow.stack[0].leave.bias[1] = 1.0
    return flow.requires_grad_(False)


def test_the_unknown_pixel_has_its_distribution_given_the_known_one():
    flow = shifting_flow()
    n = 5000  # so many tell a spread that is 2 % too large: a term of the acceptance that is a fifth too small
    images = torch.zeros(n, 1, 1, 2, dtype=F64)
    images[:, 0, 0, 0] = 0.8
    known = torch.tensor([[[True, False]]])
    mu, _ = flow.stack[0].coefficients(torch.full((1, 1, 1), 0.8, dtype=F64), None)
    assert abs(float(mu)) > 0.3
    found = inpaint(flow, images, known, steps=60, step_size=0.3)
    assert torch.equal(found.images[..., 0], images[..., 0])
    drawn = found.images[:, 0, 0, 1]
    assert float(drawn.mean()) == pytest.approx(float(mu), abs=0.03)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.014)
    assert 0.3 < float(found.acceptance.mean()) < 0.9


def test_the_earlier_pixel_given_the_later_one_is_bayes_rule():
    flow = shifting_flow()
    n = 1500
    images = torch.zeros(n, 1, 1, 2, dtype=F64)
    images[:, 0, 0, 1] = 1.5
    found = inpaint(flow, images, torch.tensor([[[False, True]]]), steps=80, step_size=0.3)
    grid = torch.zeros(4001, 1, 1, 2, dtype=F64)
    grid[:, 0, 0, 0], grid[:, 0, 0, 1] = torch.linspace(-8, 8, 4001), 1.5
    p = torch.softmax(flow.log_prob(grid), 0)
    expected = float((p * grid[:, 0, 0, 0]).sum())
    assert float(found.images[:, 0, 0, 0].mean()) == pytest.approx(expected, abs=0.07)


def test_of_noisy_images_the_known_pixels_come_back_clean(make_flow):
    flow = make_flow((1, 4, 6), num_classes=2, spread=0.01)
    images = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    known = torch.ones(4, 6, dtype=torch.bool)
    known[1:3] = False
    before = images.clone()
    one, two = inpaint(flow, images, known, 1, steps=6), inpaint(flow, images, known, 1, steps=6)
    assert torch.equal(one.images, two.images)
    assert torch.equal(images, before)
    assert torch.equal(one.images[..., known], images[..., known])
    assert not torch.equal(one.images[..., ~known], images[..., ~known])


def test_the_class_is_that_of_the_density_that_is_drawn_from(make_flow):
    flow = make_flow((1, 4, 6), num_classes=2, noise="uniform", spread=0.2)
    images, known = torch.zeros(2, 1, 4, 6, dtype=F64), torch.arange(6) < 3
    found = [
        inpaint(flow, images, known, label, steps=6, step_size=0.05).images for label in (0, 1, torch.tensor([0, 1]))
    ]
    assert not torch.allclose(found[0], found[1])
    assert torch.allclose(found[2], torch.stack([found[0][0], found[1][1]]))


def test_an_impossible_start_is_refused(make_flow):
    flow = make_flow(noise="uniform", preprocess="logit")
    with pytest.raises(DataError, match="no density"):
        inpaint(flow, torch.full((1, 1, 4, 6), 2.0, dtype=F64), torch.zeros(4, 6, dtype=torch.bool))


def test_steps_that_would_change_nothing_and_masks_that_are_none_are_refused(make_flow):
    flow = make_flow()
    images, known = torch.zeros(2, 1, 4, 6, dtype=F64), torch.zeros(4, 6, dtype=torch.bool)
    for wrong in ({"steps": 0}, {"steps": -1}, {"step_size": 0.0}, {"step_size": -1.0}, {"step_size": float("nan")}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} = .*; expected a"):
            inpaint(flow, images, known, **wrong)
    for mask in (known.double(), known.byte()):
        with pytest.raises(DataError, match=rf"a mask of bool, .* found {mask.dtype}: known > 0"):
            inpaint(flow, images, mask)
    with pytest.raises(DataError, match=r"known has shape \(5, 6\); expected that of the images, \(2, 1, 4, 6\)"):
        inpaint(flow, images, torch.zeros(5, 6, dtype=torch.bool))
    for other in (images[:, :, :3], images[0], images.byte()):
        with pytest.raises(DataError, match=r"expected images \(batch, 1, 4, 6\) with pixels from -1 to 1, found"):
            inpaint(flow, other, known[:3])
