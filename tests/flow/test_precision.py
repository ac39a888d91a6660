"""What is sampled or measured is so in float32 or float64, whatever surrounds it; what cannot be so is said."""

import warnings

import pytest
import torch

from quintic.core import ConfigError
from quintic.flow import inpaint, plan_sampling
from quintic.flow.invert import invert_flow
from quintic.flow.patches import to_tokens


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused_with_advice(make_flow, dtype, direction):
    flow = make_flow(dtype=dtype, direction=direction)
    images = torch.zeros(1, *flow.shape, dtype=dtype)
    attempts = [
        lambda: flow.sample(1),
        lambda: flow.decode(images, method="sequential"),
        lambda: flow.interpolate(images[0], images[0], 2),
        lambda: flow.denoise(images),
        lambda: flow.bits_per_dim(torch.zeros(1, *flow.shape, dtype=torch.uint8)),
        lambda: inpaint(flow, images, torch.zeros(flow.shape, dtype=torch.bool), steps=1),
    ]
    if direction == "density":
        attempts.append(lambda: plan_sampling(flow, 1))
    for attempt in attempts:
        with pytest.raises(ConfigError, match=rf"{dtype}; expected float32 or float64 .* flow\.float\(\)"):
            attempt()
    assert flow.float().sample(1).images.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_tolerances_are_those_of_the_weights_whatever_the_latents_come_in(make_flow, dtype, given):
    flow = make_flow((1, 8, 8), dtype=dtype)
    z = torch.randn(2, *flow.shape, generator=torch.Generator().manual_seed(0)).to(given)
    images, found = flow.decode(z, method="jacobi")
    expected, same = flow.decode(z.to(dtype), method="jacobi")
    assert images.dtype == dtype and torch.equal(images, expected)
    assert found.blocks == same.blocks and not any(block.finished_sequentially for block in found.blocks)


def steep(make_flow, dtype):
    """The second block multiplies what it is given by exp(13): rounding it to float32 loses the latents."""
    flow = make_flow(dtype=torch.float64)
    with torch.no_grad():
        alpha, mu = flow.stack[1].leave.bias.chunk(2)
        alpha -= 13.0
        mu += 1.0
    return flow.to(dtype)


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
def test_a_check_that_fails_to_the_end_is_said(make_flow, method):
    flow = steep(make_flow, torch.float32)
    with pytest.warns(UserWarning, match=r"block 1 .* expected 1e-03, .* flow\.double\(\)") as told:
        images, found = flow.decode(flow._draw(4, 0, 0, 0), method=method, certify=True)
    assert len(told) == 1 and told[0].filename == __file__
    assert found.residual > 1e-3 and found.blocks[1].finished_sequentially == (method == "jacobi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = flow.double()
        better, found = flow.decode(flow._draw(4, 0, 0, 0), method=method, certify=True)
    assert found.residual < 1e-9
    assert torch.allclose(images.double(), better, atol=1e-4)  # the images themselves are as good as float32 has them


def test_autocast_around_it_changes_nothing_that_is_drawn_or_filled_in(make_flow):
    flow = make_flow((1, 8, 8), dtype=torch.float32, spread=0.02)
    images = flow.sample(2, method="sequential").images
    known = torch.arange(8) < 4

    def everything():
        z = to_tokens(flow._draw(2, 1, 0, 0), flow.patch)
        return [
            flow.interpolate(images[0], images[1], 3, method="sequential"),
            inpaint(flow, images, known, steps=4).images,
            *(invert_flow(flow, z, None, method=method).tokens for method in ("sequential", "jacobi")),
        ]

    expected = everything()
    with bfloat16():
        found = everything()
        plan_sampling(flow, 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
