"""RMSNorm and rotations against their definitions."""

import torch
from tests.devices import NARROW, meta_by_default, without_float64

from quintic.core.initial import initialize_
from quintic.lm.norm import RMSNorm, rms_norm
from quintic.lm.rope import rotate, rotation_table


def test_norm_by_definition_and_finite_differences():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * gain
    torch.testing.assert_close(rms_norm(x, gain, 0.01), expected)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 0.01), (x, gain))


def test_norm_of_zero_and_of_half_precision():
    norm = RMSNorm(8, 1e-6)
    initialize_(norm, 0)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all() and norm(x).eq(0).all()
    large = torch.full((1, 8), 3e4, dtype=torch.bfloat16)  # its square overflows nothing in float32
    assert norm(large).dtype == torch.bfloat16
    torch.testing.assert_close(norm(large).float(), torch.ones(1, 8))


def test_products_depend_on_distances_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=g, dtype=torch.float64)
    table = rotation_table(50, 8, 10_000.0)
    turned = [rotate(v.expand(50, 8), table) for v in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (0, 3, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert products.diagonal(1)[0] != products.diagonal(2)[0]


def test_rotation_of_one_pair_and_the_still_part():
    table = rotation_table(3, 4, 100.0, still=2)
    x = torch.tensor([5.0, 6.0, 1.0, 0.0, 0.0, 1.0]).expand(3, 6)
    angles = torch.tensor([0.0, 1.0, 2.0])
    slow = 0.1 * angles
    expected = torch.stack(
        [torch.full((3,), 5.0), torch.full((3,), 6.0), angles.cos(), angles.sin(), -slow.sin(), slow.cos()], 1
    )
    torch.testing.assert_close(rotate(x, table), expected)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_rotations_are_computed_where_there_is_double_precision(monkeypatch):
    with meta_by_default():
        assert rotation_table(3, 4, 100.0).is_meta
    expected = rotation_table(3, 4, 100.0)
    assert not expected.is_meta
    with without_float64(monkeypatch), NARROW:
        assert rotation_table(3, 4, 100.0).device == NARROW
