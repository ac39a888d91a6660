"""RMSNorm by the C kernels against float64 and against torch's operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import needs_kernels

from quintic.lm import norm
from quintic.lm.norm import RMSNorm, rms_norm

pytestmark = needs_kernels


def passes(x, gain, g, dtype=torch.float32):
    x, gain = (t.detach().to(dtype).clone().requires_grad_() for t in (x, gain))
    y = rms_norm(x, gain, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, (x, gain), g.to(dtype))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 150), st.integers(-12, 12))
def test_values_and_gradients_are_those_of_float64(rows, width, power):
    """For any width, and for numbers from 1e-12 on, where eps decides, to 1e12."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=g) * 10.0**power
    gain, dy = torch.randn(width, generator=g), torch.randn(rows, width, generator=g)
    size = float(dy.norm() * gain.abs().max() / (x.square().mean(-1).min() + 1e-6).sqrt())  # before dx cancels
    for a, b in zip(passes(x, gain, dy), passes(x, gain, dy, torch.float64), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm() + 1e-6 * size


@pytest.mark.parametrize("shape", [(3, 5, 24), (4500, 16), (0, 8), (1, 1)])
def test_shapes_and_threads(shape, monkeypatch):
    """As by torch's operators; many rows are summed in parts, whose number no thread changes."""
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)
    gain, threads, found = torch.randn(shape[-1], generator=g), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(passes(x, gain, dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    monkeypatch.setattr(norm, "fits_kernels", lambda *tensors: False)
    for a, b in zip(found[0], passes(x, gain, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    x, dy = torch.randn(2, 30, 12), torch.randn(2, 30, 12)
    gain = torch.randn(12)
    expected = passes(x, gain, dy)
    leaf = x.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    y = rms_norm(leaf, gain.requires_grad_(), 1e-6)
    found = [y.detach(), *torch.autograd.grad(y, (leaf, gain), torch.stack([dy, dy], -1)[..., 0])]
    assert not leaf.is_contiguous() and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("used", ["both", "stream", "norm"])
def test_the_gradients_of_a_stream_and_of_its_norm_are_added_in_passing(used, monkeypatch):
    layer, g, results = RMSNorm(24, 1e-6), torch.Generator().manual_seed(0), []
    x, first, second = torch.randn(3, 2, 50, 24, generator=g)
    torch.nn.init.normal_(layer.gain)
    for fits in (True, False):
        with monkeypatch.context() as patch:
            if not fits:
                patch.setattr(norm, "fits_kernels", lambda *tensors: False)
            leaf = x.clone().requires_grad_()
            stream, normed = layer.stream(leaf)
            torch.testing.assert_close(normed, layer(x))
            assert torch.equal(stream, x)
            parts = [(stream * first).sum()] if used != "norm" else []
            parts += [(normed * second).sum()] if used != "stream" else []
            results.append(torch.autograd.grad(sum(parts), (leaf, layer.gain), allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, torch.zeros(24) if b is None else b, rtol=1e-5, atol=1e-5)


def test_without_gradients_a_stream_is_itself():
    layer, x = RMSNorm(24, 1e-6), torch.randn(5, 24)
    torch.nn.init.ones_(layer.gain)
    with torch.no_grad():
        stream, normed = layer.stream(x)
        assert stream is x and torch.equal(normed, layer(x))


def test_a_nan_stays_in_its_row():
    x = torch.randn(6, 20)
    x[2, 3] = torch.nan
    y, dx, _ = passes(x, torch.ones(20), torch.ones(6, 20))
    others = torch.arange(6) != 2
    assert y[2].isnan().all() and y[others].isfinite().all() and dx[others].isfinite().all()
