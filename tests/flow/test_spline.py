"""The learned map of numbers, by itself and around the blocks of a flow."""

import pytest
import torch

from quintic.core.initial import initialize_
from quintic.flow import TarFlow, load_flow, save_flow
from quintic.flow.spline import Spline

F64 = torch.float64


def wild(bins=7, bound=2.0, dtype=F64):
    spline = Spline(bins, bound).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in spline.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return spline


def test_a_fresh_spline_is_the_identity():
    spline = Spline(6, 1.5).double()
    initialize_(spline, 0)
    x = torch.linspace(-3, 3, 61, dtype=F64)[None]
    y, logdet = spline(x)
    assert torch.allclose(y, x, rtol=0, atol=1e-12)
    assert float(logdet.detach().abs()) < 1e-10


def test_it_is_smooth_and_monotone_and_its_slope_is_that_of_autograd():
    spline = wild()
    x = torch.linspace(-3, 3, 4001, dtype=F64)[:, None].requires_grad_()
    y, logdet = spline(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all()
    assert slope.max() / slope.min() > 10
    assert torch.allclose(slope[:, 0].log(), logdet, rtol=0, atol=1e-10)
    steps = y.detach().diff(dim=0)
    assert torch.allclose(steps, 0.5 * (slope[1:] + slope[:-1]) * 6 / 4000, rtol=0, atol=1e-4)  # no jump anywhere
    ends = torch.tensor([[-2.0, 2.0]], dtype=F64)
    assert torch.allclose(spline(ends)[0], ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-4)])
def test_its_inverse(dtype, tolerance):
    spline = wild(dtype=dtype)
    y = torch.linspace(-5, 5, 2001, dtype=dtype)
    x = spline.inverse(y)
    assert x.dtype == dtype
    assert (spline(x[None])[0][0] - y).abs().max() < tolerance


def test_bfloat16_does_not_touch_it():
    spline, x = wild(dtype=torch.float32), torch.linspace(-3, 3, 101)[None]
    exact = (*spline(x), spline.inverse(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = (*spline(x), spline.inverse(x))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@pytest.fixture
def around(make_flow):
    flow = make_flow((1, 4, 6), spline_bins=7, noise="uniform", preprocess="logit", num_classes=2)
    flow.before, flow.behind = wild(bound=3.0), wild(bound=4.0)
    return flow


@pytest.mark.parametrize("method", ["sequential", "jacobi", "window:2", "auto"])
def test_samplers_invert_a_flow_with_splines_and_vouch_for_it(around, method):
    x = torch.rand(4, 1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64) * 1.98 - 0.99
    with torch.no_grad():
        z, _ = around(x, 1)
    found, inversion = around.decode(z, 1, method=method, certify=True)
    assert (found - x).abs().max() < 1e-9
    assert 0 < inversion.residual < 1e-9


def test_samples_have_the_density_of_the_flow():
    # One pixel far from the rest of the image's: the blocks are the identity, the splines alone make the density.
    flow = TarFlow((1, 1, 2), patch=1, width=8, blocks=1, layers=1, head_width=8, spline_bins=7, seed=0).double()
    flow.before, flow.behind = wild(bound=1.5), wild(bound=4.0)
    drawn = flow.sample(20000, denoise=False, method="sequential", batch=20000).images.flatten().sort().values
    grid = torch.linspace(-12, 12, 40001, dtype=F64)
    with torch.no_grad():
        pairs = torch.stack([grid, torch.zeros_like(grid)], 1).view(-1, 1, 1, 2)
        density = flow.log_prob(pairs).exp()
    share = density.cumsum(0) / density.sum()  # the second pixel's density is a constant factor
    found = torch.searchsorted(drawn, grid) / len(drawn)
    assert (found - share).abs().max() < 0.015
    assert density.max() / density[20000] > 1.5


def test_a_flow_with_splines_is_kept(around, tmp_path):
    save_flow(around, tmp_path / "flow.safetensors")
    again = load_flow(tmp_path / "flow.safetensors").double()
    x = torch.zeros(2, 1, 4, 6, dtype=F64)
    assert again.arguments == around.arguments | {"shape": (1, 4, 6)}
    assert torch.allclose(again.log_prob(x, 0), around.log_prob(x, 0), rtol=1e-2)
    assert set(again.state_dict()) - set(TarFlow(**{**again.arguments, "spline_bins": 0}).state_dict()) == {
        f"{place}.{name}" for place in ("before", "behind") for name in ("widths", "heights", "slopes")
    }
