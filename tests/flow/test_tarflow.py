"""The model: an exact density, and an exact inverse."""

import collections
import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.core import ConfigError, DataError
from quintic.core.roles import declared_roles
from quintic.flow import Guidance, TarFlow, shipped_flow
from quintic.flow.block import Linear

F64 = torch.float64


def images(flow, n=3, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, *flow.shape, generator=generator, dtype=F64)
    return x.to(flow.blocks[0].position.dtype)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4, 6), {}),
        ((3, 4, 2), {"patch": 2}),
        ((2, 3, 4), {"patch": 1, "blocks": 2}),
        ((1, 4, 4), {"volume_preserving": True, "learned_prior": True}),
        ((1, 4, 4), {"num_classes": 3}),
        ((1, 2, 4), {"direction": "sampling"}),
        ((1, 2, 4), {"noise": "uniform", "preprocess": "logit", "patch": 1}),
        ((1, 4, 6), {"spline_bins": 5}),
        ((1, 4, 6), {"inner_width": 7}),
        ((3, 4, 2), {"inner_width": 5, "num_classes": 3}),
        ((1, 2, 4), {"inner_width": 4, "direction": "sampling"}),
        ((1, 2, 4), {"spline_bins": 5, "noise": "uniform", "preprocess": "logit", "direction": "sampling"}),
    ],
)
def test_the_log_determinant_is_that_of_the_jacobian(make_flow, shape, options):
    flow = make_flow(shape, **options)
    x = images(flow).clamp(-0.9, 0.9)
    label = 1 if flow.num_classes else None
    _, logdet = flow(x, label)
    for one, found in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], label)[0][0], one)
        expected = torch.linalg.slogdet(jacobian.reshape(flow.dims, flow.dims)).logabsdet
        assert abs(float((found - expected).detach())) < 1e-10


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize(("channels", "options"), [(1, {}), (3, {}), (1, {"spline_bins": 6}), (2, {"inner_width": 6})])
def test_round_trip(make_flow, direction, channels, options):
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-4)):
        flow = make_flow((channels, 4, 6), dtype=dtype, num_classes=4, direction=direction, **options)
        x = images(flow, 5)
        labels = torch.tensor([0, 3, -1, 2, 2])
        with torch.no_grad():
            z, _ = flow(x, labels)
        assert (z - x).abs().max() > 0.1
        back, _ = flow.decode(z, labels)
        assert (back - x).abs().max() < tolerance
        assert back.dtype == dtype


def test_a_logit_flow_makes_images_within_the_range(make_flow):
    flow = make_flow(noise="uniform", preprocess="logit")
    x = images(flow, 6).clamp(-0.999, 0.999)
    with torch.no_grad():
        z, _ = flow(x)
    assert (flow.decode(z)[0] - x).abs().max() < 1e-9
    drawn = flow.sample(8).images
    assert drawn.abs().max() <= 1.0
    outside = x.clone()
    outside[2, 0, 0, 0] = 1.5
    assert flow.log_prob(outside)[2] == -math.inf
    assert flow.log_prob(outside)[1].isfinite()


def test_a_fresh_flow_is_the_identity():
    flow = TarFlow((3, 4, 4), patch=2, width=16, blocks=4, layers=1, head_width=16, seed=0)
    x = images(flow)
    z, logdet = flow(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(3))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(flow.log_prob(x), expected, rtol=1e-6)
    learned = TarFlow((3, 4, 4), patch=2, width=16, blocks=2, layers=1, head_width=16, learned_prior=True, seed=0)
    assert torch.allclose(learned.log_prob(x), expected, rtol=1e-6)


def test_the_prior_variance_counts_in_likelihood_and_samples():
    flow = TarFlow((1, 2, 4), patch=1, width=8, blocks=2, layers=1, head_width=8, learned_prior=True, seed=0).double()
    variance = torch.linspace(0.1, 4.0, 8, dtype=F64)
    with torch.no_grad():
        flow.prior_log_variance.copy_(variance.log()[:, None])
    x = images(flow)
    normal = torch.distributions.Normal(torch.zeros(8, dtype=F64), variance.sqrt())
    assert torch.allclose(flow.log_prob(x), normal.log_prob(x.flatten(1)).sum(1))
    drawn = flow.sample(2000, denoise=False, batch=500).images.flatten(1)
    assert torch.allclose(drawn.var(0), variance, rtol=0.15)


def test_a_block_is_causal_in_its_own_order(make_flow):
    flow = make_flow((1, 2, 12), blocks=2)  # six tokens in a row
    for index, block in enumerate(flow.blocks):
        x = torch.randn(1, 6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
        moved = x.clone()
        moved[0, 2] += 1.0
        with torch.no_grad():
            changed = ((block(x)[0] - block(moved)[0]).abs().amax(2)[0] > 1e-12).tolist()
        if index == 0:
            assert changed == [False, False, True, True, True, True]
        else:
            assert changed == [True, True, True, False, False, False]


def test_no_label_is_neither_a_class_nor_the_last_one(make_flow):
    flow = make_flow(num_classes=3)
    x = images(flow)
    with torch.no_grad():
        by_label = [flow.log_prob(x, label) for label in (0, 1, 2, -1, None)]
    for i in range(3):
        assert not torch.allclose(by_label[i], by_label[3])
    assert torch.equal(by_label[3], by_label[4])
    latents = images(flow, seed=2)
    assert torch.equal(flow.decode(latents, -1)[0], flow.decode(latents, None)[0])
    assert not torch.allclose(flow.decode(latents, -1)[0], flow.decode(latents, 2)[0])


@pytest.mark.parametrize(
    "labels", [3, -2, torch.tensor([0, 1, 9]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])]
)
def test_bad_labels_are_refused(make_flow, labels):
    flow = make_flow(num_classes=3)
    for call in (flow.log_prob, flow.decode):
        with pytest.raises(DataError, match="labels"):
            call(images(flow), labels)


def test_labels_for_a_flow_without_classes_are_refused(make_flow):
    flow = make_flow()
    with pytest.raises(DataError, match="no classes"):
        flow.log_prob(images(flow), 0)


def test_images_of_another_shape_are_refused(make_flow):
    flow = make_flow()
    for wrong in (torch.zeros(2, 1, 6, 4), torch.zeros(1, 4, 6), torch.zeros(2, 3, 4, 6)):
        with pytest.raises(DataError, match="images"):
            flow(wrong.double())
        with pytest.raises(DataError, match="images"):
            flow.decode(wrong.double())


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((1, 28, 28), {"patch": 8}, "do not divide.*1, 2, 4, 7, 14, 28"),
        ((1, 12, 18), {"patch": 5}, r"possible: \[1, 2, 3, 6\]"),
        ((1, 4, 4), {"patch": 4}, "one token"),
        ((1, 4, 4), {"patch": 2, "width": 48, "head_width": 32}, "heads"),
        ((1, 4, 4), {"patch": 2, "preprocess": "logit"}, "uniform"),
        ((1, 4, 4), {"patch": 2, "noise": "gausian"}, "did you mean 'gaussian'"),
        ((1, 4, 4), {"patch": 2, "direction": "both"}, "density"),
        ((1, 4), {"patch": 2}, r"\(channels, height, width\), found \(1, 4\)"),
        ((0, 4, 4), {"patch": 2}, "channels = 0; expected a whole number, 1 or more"),
        ((1, 4, 4), {"patch": 2, "blocks": 0}, "blocks = 0; expected a whole number, 1 or more"),
        ((1, 4, 4), {"patch": 2, "head_width": 0}, "head_width = 0"),
        ((1, 4, 4), {"patch": 2, "num_classes": -1}, "num_classes = -1; expected a whole number, 0 or more"),
        ((1, 4, 4), {"patch": 2, "levels": 1}, "levels = 1; expected a whole number, 2 or more"),
        ((1, 4, 4), {"patch": 2, "sigma": float("nan")}, "sigma = nan"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, options, words):
    with pytest.raises(ConfigError, match=words):
        TarFlow(shape, **options)


def test_an_image_does_not_depend_on_its_batch(make_flow):
    flow = make_flow(num_classes=2)
    x, labels = images(flow, 7), torch.tensor([0, 1, -1, 0, 0, 1, 1])
    with torch.no_grad():
        whole = flow.log_prob(x, labels)
        alone = torch.cat([flow.log_prob(x[i : i + 1], labels[i : i + 1]) for i in range(7)])
    assert torch.allclose(whole, alone, rtol=0, atol=1e-11)
    denoised = flow.denoise(x, labels)
    assert torch.allclose(denoised[3:4], flow.denoise(x[3:4], labels[3:4]), rtol=0, atol=1e-12)
    one = flow.sample(7, labels, seed=5, batch=7, method="sequential").images
    other = flow.sample(7, labels, seed=5, batch=3, method="jacobi").images
    assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fresh", [False, True])
def test_nothing_of_the_caller_is_changed(make_flow, fresh):
    flow = TarFlow((1, 4, 6), patch=2, width=8, blocks=2, layers=1, head_width=8, seed=0) if fresh else make_flow()
    x = images(flow)
    before, weights = x.clone(), copy.deepcopy(flow.state_dict())
    flow(x)
    for method in ("sequential", "jacobi"):
        flow.decode(x, method=method)[0].fill_(7.0)  # and what it returns is not the caller's either
    flow.denoise(x)
    flow.sample(2)
    assert torch.equal(x, before)
    assert all(torch.equal(weights[k], v) for k, v in flow.state_dict().items())
    assert all(p.grad is None for p in flow.parameters())


def test_denoising_a_gaussian_is_wieners_filter():
    # Data N(0, v), noise sigma^2: the noisy density is N(0, v + sigma^2), the mean of the clean value x v / (v + s^2).
    flow = TarFlow((1, 2, 2), patch=1, width=8, blocks=1, layers=1, head_width=8, learned_prior=True, sigma=0.5, seed=0)
    clean = 0.75
    with torch.no_grad():
        flow.prior_log_variance.fill_(math.log(clean + 0.25))
    x = images(flow)
    assert torch.allclose(flow.denoise(x), x * clean, atol=1e-6)


def test_a_flow_of_uniform_noise_has_no_denoiser(make_flow):
    flow = make_flow(noise="uniform")
    with pytest.raises(ConfigError, match="uniform"):
        flow.denoise(images(flow))
    with pytest.raises(ConfigError, match="uniform"):
        flow.sample(1, denoise=True)
    assert flow.sample(1).images.isfinite().all()


def test_samples_are_denoised_by_default(make_flow):
    flow = make_flow()
    raw, full = flow.sample(3, denoise=False), flow.sample(3)
    assert torch.equal(raw.latents, full.latents)
    assert torch.allclose(flow.denoise(raw.images), full.images)


def test_interpolation_ends_at_its_ends_and_keeps_the_length(make_flow):
    flow = make_flow()
    one, other = images(flow, 2)
    path = flow.interpolate(one, other, 5)
    assert torch.allclose(path[0], one, atol=1e-9)
    assert torch.allclose(path[-1], other, atol=1e-9)
    assert torch.allclose(flow.interpolate(one, one, 3), one.expand(3, -1, -1, -1), atol=1e-6)  # no angle at all
    classes = make_flow(num_classes=3)
    ends = classes.interpolate(one, other, 3, 2, guidance=Guidance(0.0))
    assert torch.allclose(ends[0], one, atol=1e-9) and torch.allclose(ends[-1], other, atol=1e-9)
    with pytest.raises(ConfigError, match="no method"):
        flow.interpolate(one, other, 3, method="no method")
    with torch.no_grad():
        lengths = flow(path)[0].flatten(1).norm(dim=1)
    assert lengths.max() <= max(lengths[0], lengths[-1]) * 1.0001


@pytest.fixture(scope="module")
def trained():
    """A trained flow, images as it makes them and clean ones with the noise of levels, and their classes."""
    flow, labels = shipped_flow("fashion28"), torch.arange(40) % 10
    noisy = flow.sample(40, labels, denoise=False, method="sequential").images
    uniform = torch.rand(noisy.shape, generator=torch.Generator().manual_seed(0))
    return flow, (noisy, flow.denoise(noisy, labels).clamp(-1, 1) + uniform / 127.5), labels


def test_round_trip_of_a_trained_flow(trained):
    flow, sets, labels = trained
    with torch.no_grad():
        for method, x in zip(("sequential", "jacobi"), sets, strict=True):
            found, inversion = flow.decode(flow(x[:8], labels[:8])[0], labels[:8], method=method, certify=True)
            assert (found - x[:8]).abs().max() < 1e-4
            assert 0 < inversion.residual < 1e-3


@pytest.mark.parametrize("kind", [0, 1])
def test_the_likelihood_is_right_under_bfloat16(trained, kind):
    flow, sets, labels = trained
    with torch.no_grad():
        exact = flow.log_prob(sets[kind], labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = flow.log_prob(sets[kind], labels)
    error = (rough - exact).abs() / flow.dims
    assert rough.dtype == torch.float32
    assert 0 < error.mean() <= (4e-4, 5e-4)[kind]
    assert error.max() <= 1.3e-3


def test_the_large_products_are_of_bfloat16(trained):
    flow, (images, _), _ = trained
    spent = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                one, other = args[-2:]
                spent[one.dtype] += one.numel() * other.shape[1]
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count(), torch.autocast("cpu", dtype=torch.bfloat16):
        flow.log_prob(images[:2], torch.zeros(2, dtype=torch.int64))
    inner = 2 * 48 * sum(m.weight.numel() for n, m in flow.named_modules() if n.endswith(("qkv", "mix", "up", "down")))
    outer = 2 * 48 * sum(m.weight.numel() for n, m in flow.named_modules() if n.endswith(("enter", "leave")))
    assert spent[torch.bfloat16] >= inner
    assert spent[torch.float32] == outer < 0.1 * inner


def test_a_refined_product_rounds_its_input_alone():
    generator = torch.Generator().manual_seed(0)
    linear = Linear(96, 24)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(3, 5, 96, generator=generator, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear.refined(x)
    expected = F.linear(x.bfloat16().double(), linear.weight.double(), linear.bias.double())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-3 < (found - linear(x)).abs().max()
    assert torch.equal(linear.refined(x), linear(x))
    grads = [torch.autograd.grad(y.square().sum(), (x, *linear.parameters())) for y in (found, linear(x))]
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("direction", ["density", "sampling"])
def test_images_are_those_of_the_weights_whatever_autocast_says(make_flow, direction):
    flow = make_flow(dtype=torch.float32, direction=direction)
    expected = flow.sample(3, method="jacobi")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flow.sample(3, method="jacobi")
    assert torch.equal(found.images, expected.images)


def test_checkpointing_keeps_the_inputs_of_blocks_alone(make_flow):
    kept, grads = {}, {}
    for checkpoint in (False, True):
        flow = make_flow((1, 8, 8), checkpoint=checkpoint)
        x = images(flow, 4)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = flow.log_prob(x).sum()
        kept[checkpoint] = sum(sizes)
        loss.backward()
        grads[checkpoint] = [p.grad for p in flow.parameters()]
    assert kept[True] < 0.05 * kept[False]
    assert all(torch.allclose(a, b) for a, b in zip(*grads.values(), strict=True))


def test_checkpointing_changes_no_gradient_under_bfloat16(trained):
    flow, (images, _), labels = trained
    grads = []
    for flow.checkpoint in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flow.log_prob(images[:8], labels[:8]).sum() / flow.dims
        grads.append(torch.autograd.grad(loss, list(flow.parameters())))
    flow.checkpoint = False
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("direction", ["density", "sampling"])
def test_gradients_are_those_of_finite_differences(make_flow, direction):
    flow = make_flow((1, 2, 4), patch=1, blocks=2, layers=1, direction=direction)
    x = images(flow, 2)
    flow.log_prob(x).sum().backward()
    for name in ("blocks.0.leave.weight", "blocks.1.layers.0.qkv.weight", "blocks.0.position"):
        parameter = flow.get_parameter(name)
        step = torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(3)) * 1e-5
        with torch.no_grad():
            parameter += step
            up = flow.log_prob(x).sum()
            parameter -= 2 * step
            down = flow.log_prob(x).sum()
            parameter += step
        assert float((parameter.grad * step).sum()) == pytest.approx(float(up - down) / 2, rel=1e-5)


def test_the_directions_are_inverse_to_each_other(make_flow):
    one = make_flow((1, 2, 4), direction="density")
    other = make_flow((1, 2, 4), direction="sampling")
    x = images(one)
    with torch.no_grad():
        z, logdet = one(x)
        back, logdet_back = other(z)
    assert torch.allclose(back, x, atol=1e-10)
    assert torch.allclose(logdet_back, -logdet, atol=1e-10)


def test_the_same_seed_gives_the_same_flow_and_every_parameter_has_a_role():
    flows = [TarFlow((1, 4, 4), patch=2, num_classes=2, learned_prior=True, seed=seed) for seed in (0, 0, 1)]
    first, second, third = (flow.state_dict() for flow in flows)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)
    assert set(declared_roles(flows[0])) == {name for name, _ in flows[0].named_parameters()}
    assert not list(flows[0].buffers())  # no masks in a checkpoint


def test_a_printed_flow_tells_the_size_of_every_layer():
    sizes = {"patch": 2, "width": 8, "blocks": 2, "layers": 1, "head_width": 8}
    flow = TarFlow((1, 4, 4), **sizes, num_classes=3, spline_bins=4, inner_width=5, seed=0)
    for module in flow.modules():
        if list(module.parameters(recurse=False)):
            assert module.extra_repr(), module
    assert "4 tokens in reverse, 3 classes" in repr(flow) and "(enter): Linear(4 -> 8)" in repr(flow)
