"""A learned guess is where sweeps begin; what they find does not depend on it."""

import pytest
import torch

from quintic.core import ConfigError
from quintic.flow import Guidance, LinearGuess, TarFlow
from quintic.flow.invert import Tolerance, invert_flow
from quintic.flow.patches import to_tokens


@pytest.fixture(scope="module")
def fitted():
    """A flow that is far from the identity, and its guess."""
    sizes = {"patch": 2, "width": 16, "blocks": 3, "layers": 1, "head_width": 8, "num_classes": 2}
    flow = TarFlow((1, 4, 12), **sizes, seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.05 if ".leave." in name else 0.1) * noise
    return flow, LinearGuess.fit(flow, 600)


def latents(flow, n):
    return torch.randn(n, *flow.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_it_is_nearer_than_the_latents(fitted):
    flow, guess = fitted
    x = flow.as_tokens(flow.sample(50, seed=9, denoise=False, method="sequential").images)[0]
    with torch.no_grad():
        for index, block in enumerate(flow.stack):
            z, _ = block(x, flow.rows(None, 50))
            one, other = block.ordered(z), block.ordered(x)
            assert (guess(index, one) - other).square().mean() < 0.7 * (one - other).square().mean()
            x = z


@pytest.mark.parametrize("guidance", [None, Guidance(1.0)])
@pytest.mark.parametrize("method", ["jacobi", "window:3", "sequential"])
def test_images_are_the_same_with_it(fitted, method, guidance):
    flow, guess = fitted
    z = latents(flow, 4)
    expected, _ = flow.decode(z, 1, method="sequential", guidance=guidance)
    found, inversion = flow.decode(z, 1, method=method, guidance=guidance, guess=guess, certify=True)
    assert (found - expected).abs().max() < 1e-9
    assert inversion.residual < 1e-9
    assert not any(report.finished_sequentially for report in inversion.blocks)
    drawn = [flow.sample(3, 1, method=method, guidance=guidance, guess=g).images for g in (guess, None)]
    assert torch.allclose(*drawn, rtol=0, atol=1e-9)


def test_every_block_that_guesses_is_given_one(fitted):
    flow, guess = fitted
    asked = []

    def spy(block, z):
        asked.append((block, len(z)))
        return guess(block, z)

    blocks = list(reversed(range(len(flow.stack))))
    flow.sample(3, 1, method="jacobi", guess=spy, batch=2)
    assert asked == [(block, size) for size in (2, 1) for block in blocks]
    flow.sample(3, 1, method="sequential", guess=spy)
    assert len(asked) == 2 * len(blocks)


def test_it_saves_sweeps(fitted):
    flow, guess = fitted
    z, rows = to_tokens(latents(flow, 8), flow.patch), flow.rows(None, 8)
    near = Tolerance(1e-5, 1e-1)  # at the last digit nearly all sweeps are needed
    sweeps = [
        sum(r.sweeps for r in invert_flow(flow, z, rows, method="jacobi", tolerance=near, guess=g).blocks)
        for g in (guess, None)
    ]
    assert sweeps[0] < sweeps[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_a_bad_guess_does_no_harm(fitted, value):
    flow, guess = fitted
    bad = LinearGuess(torch.full_like(guess.matrices, value), guess.shifts)
    z = latents(flow, 3)
    found, inversion = flow.decode(z, method="jacobi", guess=bad)
    assert (found - flow.decode(z, method="sequential")[0]).abs().max() < 1e-9
    assert inversion.residual < 1e-9
    assert not any(report.finished_sequentially for report in inversion.blocks)  # it cost no block its sweeps


def test_of_the_identity_it_is_nearly_the_identity():
    flow = TarFlow((1, 2, 4), patch=2, width=8, blocks=2, layers=1, head_width=8, seed=0)
    guess = LinearGuess.fit(flow, 500)
    assert torch.allclose(guess.matrices, torch.eye(8).expand(2, 8, 8), atol=0.02)


def test_flows_that_cannot_have_one_are_refused():
    sizes = {"patch": 2, "width": 8, "blocks": 1, "layers": 1, "head_width": 8}
    with pytest.raises(ConfigError, match="one parallel pass"):
        LinearGuess.fit(TarFlow((1, 4, 4), direction="sampling", **sizes))
    with pytest.raises(ConfigError, match="4800"):
        LinearGuess.fit(TarFlow((3, 40, 40), **sizes))
    with pytest.raises(ConfigError, match="samples = 1; expected a whole number, 2 or more"):
        LinearGuess.fit(TarFlow((1, 4, 4), **sizes), 1)
