"""Parts of fused matrices in the diagnosis and in spectral clipping; spectra for the report."""

import itertools
import json
import math

import pytest
import torch
from tests.optim.toy import randn
from torch import nn

from quintic.core.roles import Normal, Role, declare
from quintic.optim import GradientClipping, Muon, diagnose, snapshot

SPLIT = {"sizes": (4, 2, 2), "groups": 2}


class Fused(nn.Module):
    """A fused projection, an output projection by heads and stored the other way round, a stack, an embedding."""

    def __init__(self):
        super().__init__()
        for i, (name, shape, role, how) in enumerate(
            [
                ("qkv", (16, 8), Role.MATRIX, {"split": SPLIT}),
                ("out", (8, 8), Role.MATRIX, {"split": {"axis": "columns", "blocks": 2}, "orientation": "in_out"}),
                ("experts", (3, 12, 8), Role.EXPERT_STACK, {}),
                ("embed", (9, 8), Role.EMBEDDING, {}),
            ]
        ):
            setattr(self, name, nn.Parameter(randn(*shape, seed=i, dtype=torch.float64)))
            declare(self, name, role, Normal(1.0), **how)


def separate(model, what):
    """{name: matrices} of weights or gradients, taken apart by hand."""
    t = {name: what(p) for name, p in model.named_parameters()}
    q = t["qkv"]
    return {
        "qkv[0]": [torch.cat([q[:4], q[8:12]])],
        "qkv[1]": [torch.cat([q[4:6], q[12:14]])],
        "qkv[2]": [torch.cat([q[6:8], q[14:]])],
        "out": list(t["out"].T.chunk(2, 1)),
        "experts": list(t["experts"]),
    }


def stepped(**settings):
    model = Fused()
    optimizer = Muon(model, **{"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9, **settings})
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=10 + i, dtype=torch.float64)
    before = snapshot(optimizer)
    optimizer.step()
    return model, optimizer, before


def test_each_part_has_a_row_of_its_own():
    model, optimizer, before = stepped()
    found = diagnose(model, optimizer, before)
    new, gradients = separate(model, lambda p: p.detach()), separate(model, lambda p: p.grad)
    old = separate(model, lambda p: before[p])
    assert [row.name for row in found.matrices] == list(new)
    for row in found.matrices:
        W, G, old_W = new[row.name], gradients[row.name], old[row.name]
        n, m = W[0].shape
        assert (row.matrices, row.shape) == (len(W), (n, m))
        assert row.spectral_norm == pytest.approx(max(torch.linalg.matrix_norm(w, 2).item() for w in W))
        assert row.predicted_change == pytest.approx(
            sum(((w - o) * g).sum().item() for w, o, g in zip(W, old_W, G, strict=True)), rel=1e-9
        )
        nuclear = sum(torch.linalg.matrix_norm(g, "nuc").item() for g in G)
        assert row.msign_change == pytest.approx(-0.01 * 0.2 * max(n, m) ** 0.5 * nuclear, rel=1e-6)
        assert row.orthogonalized == len(W)
        assert row.update_rms == pytest.approx(0.2 * (min(n, m) * max(n, m) / (n * m)) ** 0.5, rel=0.05)
    assert found.metrics["muon_matrices"] == found.metrics["orthogonalized_matrices"] == 3 + 2 + 3


def test_spectra_are_singular_values_at_log_spaced_places_and_fit_for_json():
    model, optimizer, before = stepped()
    spectra = json.loads(json.dumps(diagnose(model, optimizer, before).spectra, allow_nan=False))
    new, old = separate(model, lambda p: p.detach()), separate(model, lambda p: before[p])
    assert spectra.keys() == new.keys()
    for name, found in spectra.items():
        assert found["shape"] == list(new[name][0].shape)
        ranks = found["rank"]
        assert ranks[0] == 1 and ranks[-1] == min(found["shape"]) and ranks == sorted(set(ranks))
        weights = torch.stack([torch.linalg.svdvals(w) for w in new[name]]).mean(0)
        updates = torch.stack([torch.linalg.svdvals(w - o) for w, o in zip(new[name], old[name], strict=True)]).mean(0)
        assert found["weight"] == pytest.approx([weights[r - 1].item() for r in ranks], rel=1e-6)
        assert found["update"] == pytest.approx([updates[r - 1].item() / 0.01 for r in ranks], rel=1e-5)


def test_many_matrices_are_thinned_evenly_and_large_ones_by_rank():
    model = nn.Sequential(*[nn.Linear(300 if i == 0 else 4, 300 if i == 0 else 4, bias=False) for i in range(30)])
    optimizer = Muon(list(model.named_parameters()), lr=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    optimizer.step()
    spectra = diagnose(model, optimizer, before).spectra
    assert len(spectra) == 8 and next(iter(spectra)) == "0.weight" and "29.weight" in spectra
    ranks = spectra["0.weight"]["rank"]
    assert len(ranks) <= 24 and ranks[:3] == [1, 2, 3] and ranks[-1] == 300
    ratios = [b / a for a, b in itertools.pairwise(ranks[8:])]
    assert max(ratios) / min(ratios) < 1.2
    assert set(spectra["0.weight"]["update"]) == {None}  # the rate was 0


def test_the_change_that_was_predicted_and_the_one_observed():
    """For a short step of a smooth loss both agree to first order; far too long a step shows."""
    X, Y = randn(64, 8, dtype=torch.float64), randn(64, 4, seed=1, dtype=torch.float64)
    for lr, near in ((1e-4, True), (3.0, False)):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        optimizer = Muon([model[0].weight, model[2].weight], lr=lr, weight_decay=0.0)
        loss = (model(X) - Y).square().mean()
        loss.backward()
        before = snapshot(optimizer)
        optimizer.step()
        observed = ((model(X) - Y).square().mean() - loss).item()
        metrics = diagnose(model, optimizer, before, observed_change=observed).metrics
        assert metrics["observed_change"] == observed
        assert metrics["predicted_change"] < 0
        ratio = observed / metrics["predicted_change"]
        assert (abs(ratio - 1) < 0.01) == near
        assert near or observed > 0


def test_a_skipped_step_still_has_spectra_of_weights():
    model = Fused()
    optimizer = Muon(model, lr=0.01)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    before = snapshot(optimizer)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    found = diagnose(model, optimizer, before)
    assert found.spectra["experts"]["weight"][0] > 0
    assert set(found.spectra["experts"]["update"]) == {0.0}


def test_spectral_clipping_takes_every_part_by_itself():
    model = Fused()
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=i, dtype=torch.float64) * 2
    with torch.no_grad():
        model.qkv.grad[4:6] *= 0.01  # a small k
        model.qkv.grad[12:14] *= 0.01
    was, embed = separate(model, lambda p: p.grad.clone()), model.embed.grad.clone()
    result = GradientClipping("spectral", 1.0)(model)
    got = separate(model, lambda p: p.grad)
    factors = []
    for name, matrices in was.items():
        for after, before in zip(got[name], matrices, strict=True):
            factor = min(1.0, 1.0 / torch.linalg.matrix_norm(before, 2).item())
            torch.testing.assert_close(after, before * factor)
            factors.append(factor)
    assert factors.count(1.0) == 1
    factors.append(1.0 / torch.linalg.matrix_norm(embed, 2).item())
    assert result.fraction == pytest.approx(sum(f < 1 for f in factors) / len(factors))
    torch.testing.assert_close(model.embed.grad, embed * factors[-1])
