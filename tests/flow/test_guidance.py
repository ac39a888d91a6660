"""Guidance: the formulas, the schedule, and what is no guidance at all."""

import math

import pytest
import torch

from quintic.core import ConfigError
from quintic.flow import Guidance, TarFlow

F64 = torch.float64


def coefficients(seed, k=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, k, 3, generator=generator, dtype=F64) for _ in range(4)]


def combine(guidance, mu, alpha):
    return guidance.combine(mu, alpha, guidance.weights(1, 1 + mu[0].shape[1], 6)[:, None])


@pytest.mark.parametrize("rule", ["linear", "density"])
def test_weight_zero_leaves_the_class_alone(rule):
    mu_c, mu_u, alpha_c, alpha_u = coefficients(0)
    mu, alpha = combine(Guidance(0.0, rule=rule), (mu_c, mu_u), (alpha_c, alpha_u))
    assert torch.allclose(mu, mu_c)
    assert torch.allclose(alpha, alpha_c)


@pytest.mark.parametrize("rule", ["linear", "density"])
def test_equal_passes_leave_the_class_alone(rule):
    mu_c, _, alpha_c, _ = coefficients(1)
    mu, alpha = combine(Guidance(3.0, rule=rule), (mu_c, mu_c), (alpha_c, alpha_c))
    assert torch.allclose(mu, mu_c)
    assert torch.allclose(alpha, alpha_c)


def test_the_linear_rule_extrapolates_both():
    mu_c, mu_u, alpha_c, alpha_u = coefficients(2)
    mu, alpha = combine(Guidance(2.0), (mu_c, mu_u), (alpha_c, alpha_u))
    assert torch.allclose(mu, 3 * mu_c - 2 * mu_u)
    assert torch.allclose(alpha, 3 * alpha_c - 2 * alpha_u)


def test_the_density_rule_is_the_product_of_the_densities():
    w = 1.7
    mu_c, mu_u, sigma_c, sigma_u = 0.3, -0.8, 0.6, 1.1
    tensors = [torch.full((1, 1, 1), v, dtype=F64) for v in (mu_c, mu_u, math.log(sigma_c), math.log(sigma_u))]
    mu, alpha = combine(Guidance(w, rule="density"), (tensors[0], tensors[1]), (tensors[2], tensors[3]))
    x = torch.linspace(-15, 15, 200001, dtype=F64)
    log = (1 + w) * torch.distributions.Normal(mu_c, sigma_c).log_prob(x)
    log -= w * torch.distributions.Normal(mu_u, sigma_u).log_prob(x)
    p = torch.softmax(log, 0)
    mean = float((p * x).sum())
    assert float(mu) == pytest.approx(mean, abs=1e-6)
    assert float(alpha.exp()) == pytest.approx(math.sqrt(float((p * (x - mean) ** 2).sum())), rel=1e-6)


def test_the_density_rule_never_widens():
    mu_c, mu_u, alpha_c, alpha_u = coefficients(3)
    _, alpha = combine(Guidance(5.0, rule="density"), (mu_c, mu_u), (alpha_c, alpha_u))
    assert (alpha <= alpha_c + 1e-12).all()
    mu, none = combine(Guidance(5.0, rule="density"), (mu_c, mu_u), None)
    assert none is None
    assert torch.allclose(mu, 6 * mu_c - 5 * mu_u)


def test_a_growing_weight_reaches_its_value_at_the_last_token():
    growing = Guidance(2.0, schedule="growing")
    assert growing.weights(1, 6, 6).tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert growing.weights(3, 4, 6).tolist() == pytest.approx([1.2])
    mu_c, mu_u, alpha_c, alpha_u = coefficients(4)
    mu, _ = combine(growing, (mu_c, mu_u), (alpha_c, alpha_u))
    assert torch.allclose(mu[:, 2], mu_c[:, 2] + 1.2 * (mu_c[:, 2] - mu_u[:, 2]))


def test_weight_zero_samples_as_without(make_flow):
    flow = make_flow(num_classes=2)
    assert torch.equal(flow.sample(2, 1, guidance=Guidance(0.0)).images, flow.sample(2, 1).images)
    assert not torch.allclose(flow.sample(2, 1, guidance=Guidance(1.0)).images, flow.sample(2, 1).images)


def test_a_flow_without_classes_is_guided_by_its_temperature(make_flow):
    flow = make_flow()
    plain = flow.sample(2, denoise=False).images
    near = flow.sample(2, denoise=False, guidance=Guidance(1.0, temperature=1.0 + 1e-9)).images
    assert torch.allclose(near, plain, atol=1e-6)
    assert not torch.allclose(flow.sample(2, denoise=False, guidance=Guidance(1.0, temperature=0.3)).images, plain)


def test_guidance_to_nowhere_is_refused(make_flow):
    for flow in (make_flow(), make_flow(num_classes=2)):
        with pytest.raises(ConfigError, match="class to go to"):
            flow.sample(2, guidance=Guidance(1.0))
    sampling = TarFlow((1, 4, 4), patch=2, width=8, blocks=1, layers=1, head_width=8, direction="sampling", seed=0)
    with pytest.raises(ConfigError, match="direction"):
        sampling.sample(1, guidance=Guidance(1.0, temperature=0.5))


@pytest.mark.parametrize(
    "wrong", [{"weight": -1.0}, {"weight": math.nan}, {"temperature": 0.0}, {"rule": "densty"}, {"schedule": "up"}]
)
def test_bad_guidance_is_refused(wrong):
    with pytest.raises(ConfigError):
        Guidance(**{"weight": 1.0, **wrong})
