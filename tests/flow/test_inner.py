"""Numbers of a token that are predicted from those before them."""

import pytest
import torch

from quintic.core import ConfigError
from quintic.core.initial import initialize_
from quintic.flow import Guidance, TarFlow, load_flow, save_flow
from quintic.flow.block import FlowBlock
from quintic.flow.patches import to_tokens
from quintic.optim import Muon

F64 = torch.float64


def wild(block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=F64)
    return block


def make_block(numbers=4, inner_width=9, **options):
    block = FlowBlock(3, numbers, 8, 1, 8, inner_width=inner_width, **options).double()
    initialize_(block, 0)
    return wild(block)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("numbers", "inner_width"), [(4, 9), (5, 2), (2, 1)])
def test_a_number_depends_on_itself_and_all_before_it_alone(numbers, inner_width, flipped):
    block = make_block(numbers, inner_width, flipped=flipped)
    x = torch.randn(3 * numbers, generator=torch.Generator().manual_seed(1), dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v.view(1, 3, numbers))[0].flatten(), x)
    if flipped:
        jacobian = jacobian.flip(0, 1)
    assert torch.equal(jacobian, jacobian.tril())
    within = jacobian[numbers : 2 * numbers, numbers : 2 * numbers].tril(-1)
    seen = numbers - 1 if inner_width < numbers - 1 else numbers * (numbers - 1) // 2
    assert (within != 0).sum() >= seen
    assert (jacobian[numbers:, :numbers] != 0).all()


@pytest.mark.parametrize("volume_preserving", [False, True])
@pytest.mark.parametrize(("numbers", "inner_width"), [(4, 9), (5, 2), (3, 2), (2, 1)])
def test_the_inverse_of_a_block_and_its_determinant(numbers, inner_width, volume_preserving):
    block = make_block(numbers, inner_width, volume_preserving=volume_preserving, flipped=True)
    x = torch.randn(5, 3, numbers, generator=torch.Generator().manual_seed(1), dtype=F64)
    z, logdet = block(x)
    back, other = block.inverse(z)
    assert (back - x).abs().max() < 1e-11
    assert (logdet + other).abs().max() < 1e-11
    assert bool(logdet.abs().max() > 0.1) != volume_preserving


def slow_inverse(flow, z, rows, guidance):
    """Number by number with the model's own parallel pass over everything before it."""
    none = torch.full_like(rows, flow.num_classes)
    x = to_tokens(z, flow.patch)
    with torch.no_grad():
        for block in reversed(flow.blocks):
            x = block.ordered(x).clone()
            for i in range(1, flow.tokens):
                target = x[:, i].clone()
                for j in range(flow.numbers):
                    mu, alpha = block.coefficients(x[:, :-1], rows, own=x[:, 1:])
                    if guidance:
                        other = block.coefficients(x[:, :-1], none, guidance.temperature, own=x[:, 1:])
                        weights = guidance.weights(1, flow.tokens, flow.tokens)[:, None]
                        mu, alpha = guidance.combine((mu, other[0]), (alpha, other[1]), weights)
                    x[:, i, j] = target[:, j] * alpha[:, i - 1, j].exp() + mu[:, i - 1, j]
            x = block.ordered(x)
    return x


@pytest.mark.parametrize(
    "guidance", [None, Guidance(1.5, schedule="growing"), Guidance(2.0, rule="density", temperature=0.5)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_sampler_gives_the_slow_inverse(make_flow, guidance, batch):
    flow = make_flow((1, 4, 6), num_classes=3, inner_width=5)
    z = torch.randn(batch, 1, 4, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    labels = torch.tensor([0, 2, 1, 1])[:batch]
    expected = slow_inverse(flow, z, labels, guidance)
    for method in ("sequential", "jacobi", "window:2", "auto"):
        found, inversion = flow.decode(z, labels, method=method, guidance=guidance, certify=True)
        assert (to_tokens(found, flow.patch) - expected).abs().max() < 1e-9
        assert inversion.residual < 1e-9
        assert not any(report.finished_sequentially for report in inversion.blocks)


def test_bfloat16_does_not_touch_it(make_flow):
    inner = make_flow(inner_width=5, dtype=torch.float32).blocks[0].inner
    flow = make_flow(inner_width=5, dtype=torch.float32)
    x = torch.randn(4, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = flow(x)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = flow(x)[1]
            h = torch.randn(2, 16)
            moved = inner(h, torch.randn(2, 4))
    assert (rounded - exact).abs().max() / flow.dims < 5e-4
    assert moved.dtype == torch.bfloat16  # by itself it would be: the block keeps autocast away from it


def test_fresh_ones_change_nothing_and_the_optimizer_knows_their_matrix():
    plain, flow = (TarFlow((1, 4, 6), patch=2, width=8, blocks=2, head_width=8, inner_width=r, seed=0) for r in (0, 5))
    x = torch.randn(2, 1, 4, 6)
    assert torch.equal(flow(x)[0], x)
    added = set(flow.state_dict()) - set(plain.state_dict())
    names = ("context.weight", "context.bias", "read", "leave")
    assert added == {f"blocks.{i}.inner.{name}" for i in (0, 1) for name in names}
    groups = Muon(flow, lr=0.01).param_groups
    by_muon = {id(p) for group in groups if group["algorithm"] == "muon" for p in group["params"]}
    inner = flow.blocks[0].inner
    assert id(inner.context.weight) in by_muon
    assert not by_muon & {id(inner.read), id(inner.leave), id(inner.context.bias)}


def test_tokens_of_one_number_have_no_order():
    with pytest.raises(ConfigError, match="two numbers"):
        TarFlow((1, 4, 4), patch=1, inner_width=4)


def test_it_is_kept(make_flow, tmp_path):
    flow = make_flow(inner_width=5, dtype=torch.float32)
    save_flow(flow, tmp_path / "flow.safetensors")
    again = load_flow(tmp_path / "flow.safetensors")
    assert again.arguments == flow.arguments | {"shape": (1, 4, 6)}
    x = torch.rand(2, 1, 4, 6)
    assert torch.allclose(again.log_prob(x), flow.log_prob(x), rtol=1e-2)
