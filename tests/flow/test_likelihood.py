"""Bits per dimension: constants, bounds, and probabilities that sum to one."""

import itertools
import math

import numpy as np
import pytest
import torch

from quintic.core import ConfigError, DataError
from quintic.flow.likelihood import bits, dequantise, logit_forward, logit_inverse

F64 = torch.float64


def cell_probabilities(flow):
    """Exact P of all pictures of two pixels with four levels, by quadrature over their cells."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    # Dense towards the edges of a cell, where a logit density changes fast.
    t = 8.0 * nodes
    u = 0.5 * (1.0 + np.tanh(t))
    du = 8.0 * 0.5 / np.cosh(t) ** 2 * weights
    u1, u2 = np.meshgrid(u, u, indexing="ij")
    measure = torch.from_numpy(np.outer(du, du).ravel())
    found = {}
    for levels in itertools.product(range(4), repeat=2):
        noise = torch.from_numpy(np.stack([u1.ravel(), u2.ravel()], 1)).view(-1, 1, 1, 2)
        picture = torch.tensor(levels).view(1, 1, 1, 2).expand(len(noise), -1, -1, -1)
        density = flow.log_prob(dequantise(picture, noise, 4)).exp()
        found[levels] = float((density * measure).sum()) * (2.0 / 4) ** 2
    return found


@pytest.fixture(scope="module")
def two_pixels(make_flow):
    small = {"width": 8, "blocks": 2, "layers": 1}
    flow = make_flow((1, 1, 2), patch=1, levels=4, noise="uniform", preprocess="logit", spread=0.06, **small)
    with torch.no_grad():
        for block in flow.blocks:
            block.leave.bias[0] -= 1.0  # alpha: images well within the box, as training would bring about
    return flow.requires_grad_(False)


@pytest.fixture(scope="module")
def exact(two_pixels):
    return cell_probabilities(two_pixels)


def test_the_probabilities_of_all_pictures_sum_to_one(exact):
    assert sum(exact.values()) == pytest.approx(1.0, abs=2e-4)
    assert max(exact.values()) > 1.2 / 16  # not merely uniform


def test_bits_per_dim_bounds_the_code_length_and_draws_tighten_it(two_pixels, exact):
    pictures = torch.tensor(list(exact)).view(-1, 1, 1, 2)
    truth = -np.log2(list(exact.values())) / 2
    one = np.mean([two_pixels.bits_per_dim(pictures, seed=s).numpy() for s in range(30)], axis=0)
    many = two_pixels.bits_per_dim(pictures, samples=200).numpy()
    assert (one > truth - 0.08).all()
    assert one.mean() > truth.mean() + 0.002
    assert np.exp2(-2 * many).sum() == pytest.approx(1.0, abs=0.04)


def test_noise_belongs_to_the_image_not_to_the_batch(make_flow):
    flow = make_flow((3, 4, 6), noise="uniform")
    pictures = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = flow.bits_per_dim(pictures, samples=2)
        parts = torch.cat(
            [flow.bits_per_dim(pictures[:2], samples=2), flow.bits_per_dim(pictures[2:], samples=2, first=2)]
        )
    assert torch.allclose(whole, parts, rtol=1e-12)


def test_no_picture_takes_no_bits(make_flow):
    flow = make_flow((1, 4, 6), num_classes=2)
    nothing, labels = torch.zeros(0, 1, 4, 6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert flow.bits_per_dim(nothing, labels).shape == flow.log_prob(nothing.double(), labels).shape == (0,)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_constants_are_right_for_any_number_of_channels(make_flow, channels):
    # The identity flow is a standard normal of x in [-1, 1), bins of 2 / 256: known without the code under test.
    flow = make_flow((channels, 4, 4))
    with torch.no_grad():
        for block in flow.blocks:
            block.leave.weight.zero_()
            block.leave.bias.zero_()
    middle = torch.full((2, channels, 4, 4), 128)
    expected = -math.log2(1 / math.sqrt(2 * math.pi) * 2 / 256)
    assert flow.bits_per_dim(middle).tolist() == pytest.approx([expected] * 2, abs=2e-4)


def test_the_uniform_density_costs_all_the_bits():
    dims = 12
    assert float(bits(torch.tensor([-dims * math.log(2.0)]), dims, 256)) == pytest.approx(8.0)
    assert float(bits(torch.tensor([-dims * math.log(2.0)]), dims, 4)) == pytest.approx(2.0)
    # Of several draws it is the mean density that counts, not that of its logarithms: (1 + 7) / 2 = 4.
    assert bits(torch.tensor([[1.0], [7.0]]).log(), 1, 2).tolist() == pytest.approx([-2.0])


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 1, 1, 2), torch.tensor([[[[0, 4]]]]), torch.tensor([[[[-1, 0]]]]), torch.ones(1, 1, 1, 2) > 0],
)
def test_what_is_no_picture_is_refused(two_pixels, wrong):
    with pytest.raises(DataError, match=r"levels|integers"):
        two_pixels.bits_per_dim(wrong)


def test_a_mean_of_no_draws_is_refused(two_pixels):
    for wrong in ({"samples": 0}, {"samples": -1}, {"first": -1}):
        with pytest.raises(ConfigError, match=r"= -?\d; expected a whole number"):
            two_pixels.bits_per_dim(torch.zeros(1, 1, 1, 2, dtype=torch.int64), **wrong)


def test_logit_and_back_with_its_jacobian():
    x = torch.linspace(-1, 1, 41, dtype=F64)[:, None]
    u, logdet = logit_forward(x)
    assert torch.allclose(logit_inverse(u), x, atol=1e-9)
    inner = x[1:-1]
    step = 1e-6
    slope = (logit_forward(inner + step)[0] - logit_forward(inner - step)[0]) / (2 * step)
    assert torch.allclose(logdet[1:-1], slope[:, 0].log(), atol=1e-6)
    single = logit_forward(torch.linspace(-1, 1, 4001)[:, None])[1]
    double = logit_forward(torch.linspace(-1, 1, 4001)[:, None].double())[1]
    assert (single - double).abs().max() < 1e-3


def test_the_numbers_of_the_logit_are_those_that_trained_flows_have_seen():
    x = torch.tensor([[-1.0, -0.999, -0.5, 0.0, 0.3, 0.999, 1.0]], dtype=F64)
    s = 1e-6 + (1 - 2e-6) * (x + 1) / 2
    u, logdet = logit_forward(x)
    assert torch.allclose(u, torch.log(s / (1 - s)) / 5, rtol=1e-9)
    assert torch.allclose(logdet, ((1 - 2e-6) / 2 / (s * (1 - s)) / 5).log().sum(1), rtol=1e-9)


def test_bits_are_exact_whatever_autocast_says(make_flow):
    flow = make_flow((1, 4, 6), dtype=torch.float32)
    pictures = torch.randint(0, 256, (5, 1, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = flow.bits_per_dim(pictures)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(flow.bits_per_dim(pictures), exact)
