"""Diagnostics against SVD, closed forms, simulated gradients and optimizers whose step is known."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.optim.toy import randn
from torch import nn
from torch.nn import functional as F

from quintic.core import ConfigError
from quintic.core.roles import Normal, Role, declare
from quintic.optim import Muon
from quintic.optim.clip import GradientClipping
from quintic.optim.diagnostics import diagnose, snapshot
from quintic.optim.measures import layer_shares, sign_cosine, signal_to_noise, singular_values, svd_entropy


@settings(max_examples=50, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    rank=st.integers(1, 8),
    exponent=st.integers(-200, 200),
    seed=st.integers(0, 1000),
)
def test_singular_values_match_svd(lead, n, m, rank, exponent, seed):
    x = randn(*lead, n, rank, seed=seed, dtype=torch.float64) @ randn(*lead, rank, m, seed=seed + 1).double()
    x = x * 10.0**exponent
    expected = torch.linalg.svdvals(x)
    top = expected[..., :1]
    torch.testing.assert_close(singular_values(x) / top, expected / top, rtol=0, atol=1e-6)


def test_singular_values_at_the_edges():
    assert singular_values(torch.zeros(0, 3)).shape == (0,)
    assert singular_values(torch.zeros(2, 3, 0)).shape == (2, 0)
    assert torch.equal(singular_values(torch.zeros(2, 3)), torch.zeros(2).double())
    batch = torch.eye(2).repeat(3, 1, 1)
    batch[1, 0, 1] = math.nan
    found = singular_values(batch)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], torch.ones(2, 2).double())
    assert singular_values(torch.eye(2, dtype=torch.bfloat16) * 3).tolist() == [3.0, 3.0]


def test_svd_entropy():
    sigma = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    p = sigma.square() / sigma.square().sum()
    expected = -(p * p.log()).sum() / math.log(3)
    assert svd_entropy(sigma).item() == pytest.approx(expected.item())
    assert svd_entropy(sigma * 1e-200).item() == pytest.approx(expected.item())
    assert svd_entropy(torch.full((5,), 3.0)).item() == pytest.approx(1.0)
    assert svd_entropy(torch.tensor([3.0, 0.0])).item() == 0.0
    assert svd_entropy(torch.tensor([[3.0]])).tolist() == [0.0]


@pytest.mark.parametrize("snr", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("steps", [3, 20, None])
def test_signal_to_noise_of_simulated_gradients(snr, steps):
    """Gradients of 200000 elements with a known mean: the ratio of the norms is nearly its expectation."""
    beta, n = 0.9, 200_000
    generator = torch.Generator().manual_seed(0)
    m = torch.zeros(n)
    for _ in range(steps or 100):
        g = math.sqrt(snr) + torch.randn(n, generator=generator)
        m = beta * m + (1 - beta) * g
    found = signal_to_noise(m.norm().item(), g.norm().item(), beta, steps)
    assert found == pytest.approx(snr, abs=0.05 * snr + 0.01)


def test_signal_to_noise_at_the_edges():
    assert signal_to_noise(1.0, 1.0, 0.9) == math.inf
    assert signal_to_noise(0.0, 1.0, 0.9) == 0.0
    assert math.isnan(signal_to_noise(0.0, 0.0, 0.9))
    assert math.isnan(signal_to_noise(0.1, 1.0, 0.9, 1))
    with pytest.raises(ConfigError, match="without momentum"):
        signal_to_noise(1.0, 1.0, 0.0)


def test_sign_cosine():
    tensors = [randn(50), randn(7, 3, seed=1), torch.zeros(100)]
    g = torch.cat([t.flatten() for t in tensors]).double()
    expected = F.cosine_similarity(g.sign(), g, dim=0).item()
    assert sign_cosine(tensors) == pytest.approx(expected)
    assert sign_cosine([randn(10**6)]) == pytest.approx(math.sqrt(2 / math.pi), abs=2e-3)
    assert math.isnan(sign_cosine([torch.zeros(3)]))
    assert math.isnan(sign_cosine([]))


def test_layer_shares():
    g = {
        "embed.weight": torch.tensor([1.0, 1.0]),
        "blocks.0.attention.q.weight": torch.tensor([2.0]),
        "blocks.0.experts.3.weight": torch.tensor([1.0]),
        "blocks.1.mlp.weight": torch.tensor([1e-20, 1e-20]),
        "gain": torch.tensor([1.0]),
    }
    shares = layer_shares(g)
    assert list(shares) == ["embed", "blocks.0", "blocks.1", "gain"]
    assert shares["blocks.0"] == pytest.approx(5 / 8)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert layer_shares({"a.0.weight": torch.zeros(2)}) == {"a.0": 0.0}


class Net(nn.Module):
    """Every kind of matrix: plain, fused, a stack, a convolution, and things that are none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.fused = nn.Parameter(randn(12, 8, seed=1) * 0.3)
        declare(self, "fused", Role.MATRIX, Normal(1.0), row_blocks=2)
        self.experts = nn.Parameter(randn(3, 8, 6, seed=2) * 0.3)
        declare(self, "experts", Role.EXPERT_STACK, Normal(1.0))
        self.first = nn.Conv1d(8, 8, 1)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.lm_head = nn.Linear(8, 20)
        generator = torch.Generator().manual_seed(3)
        for p in (self.embed.weight, *self.first.parameters(), self.conv.weight, *self.lm_head.parameters()):
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, ids):
        x = self.first(self.embed(ids).mT).tanh()
        x = self.conv(x).mT
        gate, up = F.linear(x, self.fused).chunk(2, dim=-1)
        return self.lm_head(x + torch.einsum("btf,edf->btd", gate.sigmoid() * up, self.experts))


IDS = torch.arange(40).reshape(2, 20) % 20


def loss_of(model):
    return F.cross_entropy(model(IDS).flatten(0, 1), (IDS * 7 % 20).flatten())


def take_step(model, optimizer, clip=math.inf):
    """One step; (diagnosis, observed change of the loss)."""
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    scale = float(GradientClipping("global", clip)(model).scale)
    before = snapshot(optimizer)
    optimizer.step()
    observed = (loss_of(model) - loss).item()
    return diagnose(model, optimizer, before, clip_scale=scale, observed_change=observed), observed


@pytest.mark.parametrize("clip", [math.inf, 0.01])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_predicted_change_is_the_observed_one_for_small_steps(clip, decay):
    model = Net().double()
    optimizer = Muon(model, lr=1e-6, weight_decay=decay)
    for _ in range(3):
        found, observed = take_step(model, optimizer, clip)
        assert observed < 0
        assert found.metrics["predicted_change"] == pytest.approx(observed, rel=1e-3)
        assert found.metrics["observed_change"] == observed


def raw_gradient():
    """Of Net's first step, as one vector."""
    model = Net().double()
    loss_of(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("clip", [math.inf, 0.01])
def test_gradient_descent_form(clip):
    """The form is of the unclipped rule; clipping makes the real change smaller by its factor."""
    model = Net().double()
    found, _ = take_step(model, torch.optim.SGD(model.parameters(), lr=0.1), clip)
    norm = raw_gradient().norm().item()
    assert norm > 0.02
    assert found.metrics["gradient_descent_change"] == pytest.approx(-0.1 * norm**2)
    assert found.metrics["sign_change"] == pytest.approx(-0.1 * raw_gradient().abs().sum().item())
    assert found.metrics["predicted_change"] == pytest.approx(-0.1 * norm**2 * min(1.0, clip / norm))


def test_sign_form():
    """Adam's first step is the sign of the gradient."""
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-30)
    found, _ = take_step(model, optimizer)
    one = sum(p.grad.abs().sum().item() for p in model.parameters())
    assert found.metrics["sign_change"] == pytest.approx(-1e-3 * one)
    assert found.metrics["predicted_change"] == pytest.approx(found.metrics["sign_change"], rel=1e-6)
    # -lr sqrt(N) ||g|| cos(sign g, g), N being the elements that are not 0
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    form = -1e-3 * math.sqrt(g.count_nonzero()) * g.norm().item() * found.metrics["sign_cosine"]
    assert form == pytest.approx(found.metrics["sign_change"])


def nuclear(model):
    """lr-free -sum s ||G||_* over all matrices of Net, by SVD."""
    total = 0.0
    for g in (*model.fused.grad.chunk(2), *model.experts.grad, model.conv.weight.grad.flatten(1)):
        total += 0.2 * math.sqrt(max(g.shape)) * torch.linalg.svdvals(g).sum().item()
    return -total


def test_msign_form():
    model = Net().double()
    optimizer = Muon(model, lr=1e-3, weight_decay=0.0, momentum=0.0, nesterov=False, method="svd")
    found, _ = take_step(model, optimizer, clip=0.01)
    assert found.metrics["matrix_predicted_change"] == pytest.approx(found.metrics["matrix_msign_change"], rel=1e-6)
    raw = Net().double()
    loss_of(raw).backward()
    assert found.metrics["matrix_msign_change"] == pytest.approx(1e-3 * nuclear(raw), rel=1e-6)


def test_rows_of_matrices():
    model = Net()
    optimizer = Muon(model, lr=1e-2, weight_decay=0.1)
    found, _ = take_step(model, optimizer)
    rows = {row.name: row for row in found.matrices}
    assert {name: (row.matrices, row.shape) for name, row in rows.items()} == {
        "fused": (2, (6, 8)),
        "experts": (3, (8, 6)),
        "conv.weight": (1, (8, 24)),
    }
    row = rows["experts"]
    assert row.weight_rms == pytest.approx(model.experts.square().mean().sqrt().item(), rel=1e-6)
    assert row.spectral_norm == pytest.approx(torch.linalg.svdvals(model.experts).max().item(), rel=1e-6)
    p = torch.linalg.svdvals(model.experts.detach().double()).square()
    p = p / p.sum(-1, keepdim=True)
    assert row.svd_entropy == pytest.approx((-(p * p.log()).sum(-1) / math.log(6)).mean().item(), rel=1e-6)
    # 0.2 sqrt(max) RMS(O) with all singular values near 1
    assert rows["conv.weight"].update_rms == pytest.approx(0.2, rel=0.1)
    assert rows["conv.weight"].residual < 0.3
    elements = {name: row.matrices * math.prod(row.shape) for name, row in rows.items()}
    for name in ("weight_rms", "update_rms"):  # over all elements
        squares = sum(getattr(row, name) ** 2 * elements[row.name] for row in rows.values())
        assert found.metrics[name] == pytest.approx(math.sqrt(squares / sum(elements.values())), rel=1e-12)
    entropy = sum(row.svd_entropy * row.matrices for row in rows.values()) / 6  # over matrices
    assert found.metrics["svd_entropy"] == pytest.approx(entropy, rel=1e-12)
    assert sum(found.layers.values()) == pytest.approx(1.0)
    assert set(found.layers) == {"embed", "fused", "experts", "first", "conv", "lm_head"}


def test_residual_is_that_of_the_polynomial_and_needs_no_decay():
    for coefficients, bound in (("exact", 1e-4), ("keller", 0.6)):
        model = Net().double()
        optimizer = Muon(model, lr=1e-3, weight_decay=0.3, coefficients=coefficients)
        found, _ = take_step(model, optimizer)
        assert found.metrics["orthogonality_residual"] < bound
        assert (found.metrics["orthogonality_residual"] > 0.05) == (coefficients == "keller")


@pytest.mark.parametrize("scale", ["moonlight", "rms", "keller", "mup", "none"])
def test_all_matrices_under_muon_are_counted_as_orthogonalized(scale):
    model = Net()
    found, _ = take_step(model, Muon(model, lr=0.02, adamw_lr=0.02, scale=scale))
    assert found.metrics["muon_matrices"] == 6
    assert found.metrics["orthogonalized_matrices"] == 6


def test_rank_deficient_updates_count_as_orthogonalized():
    linear = nn.Linear(16, 16, bias=False)
    optimizer = Muon([linear.weight], lr=0.02, scale="rms")
    linear.weight.grad = randn(16, 3) @ randn(3, 16, seed=1)
    before = snapshot(optimizer)
    optimizer.step()
    (row,) = diagnose(linear, optimizer, before).matrices
    assert row.orthogonalized == 1
    assert row.residual > 0.5  # 13 singular values are 0


class SilentlySgd(Muon):
    """The defect to be found: Muon by name, its settings in the groups, plain momentum in fact."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_muon_that_does_not_orthogonalize_is_found_out(size):
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    optimizer = SilentlySgd(list(model.parameters()), lr=0.01)
    for i, p in enumerate(model.parameters()):
        p.grad = size * (randn(32, 32, seed=i) * torch.logspace(0, -3, 32))  # a decaying spectrum, as gradients have
    before = snapshot(optimizer)
    optimizer.step()
    metrics = diagnose(model, optimizer, before).metrics
    assert metrics["muon_matrices"] == 3
    assert metrics["orthogonalized_matrices"] == 0


def test_a_skipped_step_orthogonalized_nothing():
    linear = nn.Linear(4, 4, bias=False)
    optimizer = Muon([linear.weight], lr=0.01)
    linear.weight.grad = torch.full((4, 4), math.nan)
    before = snapshot(optimizer)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    metrics = diagnose(linear, optimizer, before).metrics
    assert metrics["muon_matrices"] == 1
    assert metrics["orthogonalized_matrices"] == 0
    assert math.isnan(metrics["predicted_change"])


def test_matrices_under_adamw_have_spectra_but_no_residual():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found, _ = take_step(model, optimizer)
    assert len(found.matrices) == 3
    assert found.metrics["muon_matrices"] == 0
    assert found.metrics["svd_entropy"] > 0
    assert found.metrics["update_rms"] == pytest.approx(1.0, rel=1e-2)  # the first step is the sign
    assert math.isnan(found.metrics["orthogonality_residual"])
    assert math.isnan(found.metrics["signal_to_noise"])  # one gradient tells nothing
    assert take_step(model, optimizer)[0].metrics["signal_to_noise"] > 0


def test_signal_to_noise_does_not_depend_on_the_form_of_the_momentum():
    found = []
    for form in ("average", "sum"):
        linear = nn.Linear(12, 8, bias=False, dtype=torch.float64)  # its values do not matter
        optimizer = Muon([linear.weight], lr=0.0, momentum=0.8, momentum_form=form)
        for step in range(30):
            linear.weight.grad = 0.7 + randn(8, 12, seed=step, dtype=torch.float64)
            before = snapshot(optimizer)
            optimizer.step()
        found.append(diagnose(linear, optimizer, before).metrics["signal_to_noise"])
    assert found[0] == pytest.approx(found[1], rel=1e-9) == pytest.approx(0.49, rel=0.5)


def test_a_group_says_how_its_matrices_are_read_and_the_cap_is_told():
    linear = nn.Linear(12, 8, bias=False, dtype=torch.float64)
    linear.weight.data = randn(8, 12, seed=1, dtype=torch.float64)
    group = {"params": [linear.weight], "orientation": "in_out", "split": {"blocks": 3}}
    optimizer = Muon([group], cap=1e-3, method="svd")
    linear.weight.grad = randn(8, 12, dtype=torch.float64)
    before = snapshot(optimizer)
    optimizer.step()
    found = diagnose(linear, optimizer, before)
    assert [(row.matrices, row.shape) for row in found.matrices] == [(3, (4, 8))]
    assert found.metrics["cap_factor"] == float(optimizer.cap_factor) < 1
    assert found.metrics["orthogonalized_matrices"] == 3


def test_matrices_in_our_adamw_half_are_measured_like_those_of_torch():
    found = []
    for make in (
        lambda model: Muon([{"params": list(model.parameters()), "algorithm": "adamw"}], adamw_betas=(0.8, 0.9)),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1),
    ):
        model = Net().double()
        optimizer = make(model)
        for _ in range(3):
            last, _ = take_step(model, optimizer)
        found.append(last.metrics)
    assert found[0]["signal_to_noise"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("form", ["average", "sum"])
def test_signal_to_noise_of_both_halves(form):
    """The same gradient each time is all signal; momentum 0 tells nothing."""
    model = Net().double()
    optimizer = Muon(model, lr=0.0, momentum=0.5, momentum_form=form)
    for _ in range(25):
        found, _ = take_step(model, optimizer)
    assert found.metrics["signal_to_noise"] > 1e6
    assert math.isnan(found.metrics["update_rms"])  # no rate, no update
    without = Muon(model, lr=0.0, momentum=0.0)
    assert math.isnan(take_step(model, without)[0].metrics["signal_to_noise"])
    momentum = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # a sum, not an average
    assert math.isnan(take_step(model, momentum)[0].metrics["signal_to_noise"])


def test_nothing_is_changed():
    model = Net()
    optimizer = Muon(model, lr=1e-2)
    loss_of(model).backward()
    before = snapshot(optimizer)
    optimizer.step()
    kept = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    diagnose(model, optimizer, before)
    for p, (weights, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(p, weights)
        assert torch.equal(p.grad, gradient)


def test_parameters_without_gradient_are_left_out_and_foreign_snapshots_refused():
    model = Net()
    optimizer = Muon(model, lr=1e-2)
    loss_of(model).backward()
    model.conv.weight.grad = None
    before = snapshot(optimizer)
    assert model.conv.weight not in before
    optimizer.step()
    assert "conv.weight" not in {row.name for row in diagnose(model, optimizer, before).matrices}
    with pytest.raises(ConfigError, match="snapshot"):
        diagnose(Net(), optimizer, before)
    other = Muon(Net(), lr=1e-2)
    with pytest.raises(ConfigError, match="snapshot"):
        diagnose(model, other, before)
