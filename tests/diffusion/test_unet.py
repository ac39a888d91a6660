"""The network's shapes, start, conditioning and its mistakes."""

import pytest
import torch

from quintic.core import ConfigError
from quintic.core.roles import Role, declared_roles
from quintic.diffusion import UNet
from quintic.optim import roles

SMALL = {"width": 16, "levels": 2, "blocks": 1, "patch": 2, "heads": 2}


def awake(net):
    """The same net with its zeros replaced, so that every path matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return net.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (2, 12, 4)])
@pytest.mark.parametrize("levels", [1, 2])
def test_any_shape_that_divides_comes_back(shape, levels):
    net = awake(UNet(shape, **(SMALL | {"levels": levels}), seed=0))
    assert net(torch.randn(3, *shape), torch.zeros(3)).shape == (3, *shape)


def test_a_fresh_network_says_zero():
    net = UNet((1, 8, 8), **SMALL, seed=0)
    assert not net(torch.randn(2, 1, 8, 8), torch.zeros(2)).any()


def test_a_fresh_network_keeps_the_size_of_what_passes_through():
    """Matrices and convolutions of unit gain, and blocks and attention that add nothing yet."""
    net = UNet((1, 16, 16), **(SMALL | {"width": 32}), seed=0)
    block, halve, attention = net.down[0], net.down[1], net.middle[1]
    x, embedded = torch.randn(4, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.randn(4, 128)
    assert torch.equal(block(x, embedded), x)
    small = halve(x, embedded)
    assert torch.equal(attention(small, embedded), small)
    for out in (small, block.conv_in(x)[..., 1:-1, 1:-1], net.level_out(embedded)):
        assert out.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.15)
    assert block.film(embedded).square().mean().sqrt().item() == pytest.approx(0.1, abs=0.02)


def test_noise_level_and_every_pixel_matter():
    net = awake(UNet((1, 8, 8), **SMALL, seed=0))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    low, high = net(x, torch.tensor([-5.0])), net(x, torch.tensor([5.0]))
    assert (low - high).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(low[0, 0, 0, 0], x)
    assert (gradient != 0).all()  # attention looks everywhere


def test_images_of_a_batch_do_not_mix():
    net = awake(UNet((1, 8, 8), **SMALL, seed=0))
    x, level = torch.randn(4, 1, 8, 8), torch.tensor([-3.0, 0.0, 1.0, 6.0])
    together = net(x, level)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], level[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_classes_and_the_absent_class():
    net = awake(UNet((1, 8, 8), num_classes=3, **SMALL, seed=0))
    x, level = torch.randn(2, 1, 8, 8), torch.zeros(2)
    out = [net(x, level, torch.tensor([c, c])) for c in range(4)]
    assert all((out[0] - other).abs().max() > 1e-4 for other in out[1:])
    torch.testing.assert_close(net(x, level), out[3])
    with pytest.raises(ConfigError, match="without classes"):
        UNet((1, 8, 8), **SMALL, seed=0)(x, level, torch.tensor([0, 0]))


def test_weights_are_a_function_of_the_seed():
    one, two, other = (UNet((1, 8, 8), seed=seed, **SMALL).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["enter.weight"], other["enter.weight"])


def test_every_parameter_has_a_role_and_inner_convolutions_go_to_muon():
    net = UNet((1, 8, 8), num_classes=2, **SMALL, seed=0)
    assert declared_roles(net).keys() == dict(net.named_parameters()).keys()
    table = {row.name: row for row in roles(net, strict=True)}
    assert table["down.0.conv_in.weight"].algorithm == "muon"
    assert sum(part.matrices for part in table["middle.1.qkv.weight"].parts) == 3
    assert sum(part.matrices for part in table["down.0.film.weight"].parts) == 2
    assert table["enter.weight"].role is Role.EMBEDDING and table["enter.weight"].algorithm == "adamw"
    assert table["leave.weight"].role is Role.HEAD and table["leave.weight"].algorithm == "adamw"


def test_dropout_acts_only_in_training():
    net = awake(UNet((1, 8, 8), dropout=0.5, **SMALL, seed=0))
    x, level = torch.randn(1, 1, 8, 8), torch.zeros(1)
    assert torch.equal(net(x, level), net(x, level))
    net.train()
    assert not torch.equal(net(x, level), net(x, level))


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        ((1, 10, 8), {}, r"10 x 8 pixels do not divide by patch \* 2\^\(levels - 1\) = 4"),
        ((1, 8, 6), {}, "8 x 6 pixels"),
        ((1, 8, 8), {"width": 20}, "multiple of 8"),
        ((1, 8, 8), {"width": 0}, "width = 0; expected a whole number, 1 or more"),
        ((1, 8, 8), {"heads": 5}, "do not split into 5 heads"),
        ((1, 8, 8), {"blocks": 0}, "blocks = 0; expected a whole number, 1 or more"),
        ((1, 8), {}, r"\(channels, height, width\), found \(1, 8\)"),
        ((1, 8, 8), {"num_classes": -1}, "num_classes = -1; expected a whole number, 0 or more"),
        ((1, 8, 8), {"heads": -1}, "heads = -1"),
        ((1, 8, 8), {"dropout": 1.5}, r"dropout must be in \[0, 1\), found 1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(shape, changes, words):
    with pytest.raises(ConfigError, match=words):
        UNet(shape, **(SMALL | changes))


def test_another_image_is_refused():
    with pytest.raises(ConfigError, match=r"\(1, 8, 12\), found \(1, 12, 8\)"):
        UNet((1, 8, 12), **SMALL)(torch.zeros(1, 1, 12, 8), torch.zeros(1))


def test_a_printed_network_tells_the_size_of_every_layer():
    network = UNet((3, 16, 16), width=8, levels=2, num_classes=3, initialize=False)
    for module in network.modules():
        if list(module.parameters(recurse=False)):
            assert module.extra_repr(), module
    assert "(enter): Conv(12 -> 8, 3 x 3)" in repr(network)
