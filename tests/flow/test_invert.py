"""Sampling: every method gives what the sequential one gives, and says so only if it is true."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintic.core import ConfigError, DataError, QuinticError, SamplingError
from quintic.flow import Guidance, plan_sampling
from quintic.flow.invert import Tolerance, Workspace, invert_block, invert_flow
from quintic.flow.patches import to_tokens
from quintic.flow.planning import plan_for

F64 = torch.float64


def latents(flow, n, seed=1):
    z = torch.randn(n, *flow.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return z.to(flow.blocks[0].position.dtype)


def slow_inverse(flow, z, labels=None, guidance=None):
    """Token by token with the model's own parallel pass over all earlier tokens: no cache, no folding."""
    rows = flow.rows(labels, len(z))
    none = None if rows is None else torch.full_like(rows, flow.num_classes)
    x = to_tokens(z, flow.patch)
    n = flow.tokens
    with torch.no_grad():
        for block in reversed(flow.blocks):
            x = block.ordered(x).clone()
            for i in range(n - 1):
                mu, alpha = (v[:, -1:] for v in block.coefficients(x[:, : i + 1], rows))
                if guidance:
                    mu_u, alpha_u = (v[:, -1:] for v in block.coefficients(x[:, : i + 1], none, guidance.temperature))
                    mu, alpha = guidance.combine((mu, mu_u), (alpha, alpha_u), guidance.weights(i + 1, i + 2, n))
                x[:, i + 1] = x[:, i + 1] * alpha[:, 0].exp() + mu[:, 0]
            x = block.ordered(x)
    return x


GUIDANCES = [
    None,
    Guidance(1.5),
    Guidance(1.5, schedule="growing"),
    Guidance(0.7, temperature=0.5),
    Guidance(2.0, rule="density"),
    Guidance(2.0, rule="density", schedule="growing", temperature=2.0),
]


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("method", ["sequential", "jacobi", "window:3", "auto"])
def test_every_method_gives_the_slow_inverse(make_flow, method, guidance):
    flow = make_flow((1, 6, 6), num_classes=3)
    z, labels = latents(flow, 4), torch.tensor([0, 2, 1, 1])
    expected = slow_inverse(flow, z, labels, guidance)
    found, inversion = flow.decode(z, labels, method=method, guidance=guidance, certify=True)
    assert (to_tokens(found, flow.patch) - expected).abs().max() < 1e-9
    assert inversion.residual < 1e-10
    assert all(r.residual is not None and not r.finished_sequentially for r in inversion.blocks)


@pytest.mark.parametrize("method", ["sequential", "window:3"])
@pytest.mark.parametrize("guidance", [None, Guidance(0.7, temperature=0.5)])
@pytest.mark.parametrize(("head_width", "n"), [(8, 1), (16, 1), (16, 2), (16, 5)])
def test_every_way_to_lay_out_keys_gives_the_slow_inverse(make_flow, head_width, n, guidance, method):
    flow = make_flow((1, 6, 6), num_classes=3, head_width=head_width)
    z, labels = latents(flow, n), torch.arange(n) % 3
    found, inversion = flow.decode(z, labels, method=method, guidance=guidance, certify=True)
    assert (to_tokens(found, flow.patch) - slow_inverse(flow, z, labels, guidance)).abs().max() < 1e-9
    assert not any(r.finished_sequentially for r in inversion.blocks)


@settings(max_examples=15, deadline=None)
@given(window=st.integers(1, 11), n=st.integers(1, 5), seed=st.integers(0, 99), coarse=st.booleans())
def test_any_window_and_any_tolerance_ends_within_its_certificate(window, n, seed, coarse):
    flow = _flow()
    z = latents(flow, n, seed)
    expected = slow_inverse(flow, z)
    # A tolerance that accepts anything must be found out and mended.
    tolerance = Tolerance(10.0 if coarse else 1e-13, 1e-9)
    found = invert_flow(flow, to_tokens(z, flow.patch), None, method=f"window:{window}", tolerance=tolerance)
    assert torch.allclose(found.tokens, expected, rtol=1e-8, atol=1e-8)
    if coarse and window >= 4:
        assert any(r.finished_sequentially for r in found.blocks)
    if not coarse:
        assert all(r.sweeps <= flow.tokens - 1 and not r.finished_sequentially for r in found.blocks)


_kept = []


def _flow():
    if not _kept:
        from quintic.flow import TarFlow

        flow = TarFlow((1, 6, 8), patch=2, width=16, blocks=3, layers=2, head_width=8, seed=0).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for block in flow.blocks:
                weight = block.leave.weight
                weight += 0.03 * torch.randn(weight.shape, generator=generator, dtype=F64)
        _kept.append(flow)
    return _kept[0]


def test_the_first_tokens_are_exact_after_as_many_sweeps():
    flow = _flow()
    z = block_z = to_tokens(latents(flow, 2), flow.patch)
    block = flow.blocks[0]
    workspace = Workspace(flow, 2, None, None)
    folded = workspace.fold(block)
    with torch.no_grad():
        expected, widths = invert_block(workspace, folded, block_z, 1, 0.0)
        assert widths == [1] * (flow.tokens - 1)
        x = z.clone()
        for sweep in range(1, 5):
            x = torch.cat([z[:, :1], folded.solve(z[:, 1:], folded.read(x[:, :-1], 0))], 1)
            assert (x[:, : sweep + 1] - expected[:, : sweep + 1]).abs().max() < 1e-12
            assert (x[:, -1] - expected[:, -1]).abs().max() > 1e-9


def test_float32_methods_agree(make_flow):
    flow = make_flow((1, 8, 8), dtype=torch.float32, width=32, head_width=16, spread=0.02)
    z = latents(flow, 6)
    images = [flow.decode(z, method=m)[0] for m in ("sequential", "jacobi", "window:4", "auto")]
    assert all((images[0] - other).abs().max() < 1e-4 for other in images[1:])


def test_a_latent_that_overflows_spoils_no_other_image(make_flow):
    flow = make_flow((1, 4, 6))
    z = latents(flow, 3)
    clean = flow.decode(z, method="sequential")[0]
    for bad in (float("nan"), float("inf"), 1e300):
        spoiled = z.clone()
        spoiled[1] = bad
        for method in ("sequential", "jacobi", "window:2"):
            found, inversion = flow.decode(spoiled, method=method, certify=True)
            assert torch.allclose(found[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-9)
            assert inversion.residual < 1e-9


def test_images_that_are_not_finite_are_drawn_again_a_bounded_number_of_times(make_flow, monkeypatch):
    flow = make_flow()
    draw = flow._draw

    def spoil(n, seed, attempt, first):
        z = draw(n, seed, attempt, first)
        if attempt == 0:
            z[1] = float("nan")
        return z

    monkeypatch.setattr(flow, "_draw", spoil)
    found = flow.sample(3)
    assert found.redrawn == 1
    assert found.images.isfinite().all()
    again, _ = flow.decode(found.latents)
    assert torch.allclose(flow.denoise(again), found.images, atol=1e-9)

    monkeypatch.setattr(flow, "_draw", lambda n, seed, attempt, first: draw(n, seed, attempt, first) * float("nan"))
    with pytest.raises(SamplingError, match="not finite"):
        flow.sample(3)


def test_an_image_that_is_drawn_again_is_of_its_class_and_under_its_guidance(make_flow, monkeypatch):
    flow, labels = make_flow(num_classes=3), torch.tensor([0, 1, 2, 1, 0])
    draw = flow._draw

    def spoil(n, seed, attempt, first):
        z = draw(n, seed, attempt, first)
        if attempt < 3:  # as often as is allowed
            z[[0, -1]] = float("nan")
        return z

    monkeypatch.setattr(flow, "_draw", spoil)
    guidance = Guidance(1.0)
    found = flow.sample(5, labels, seed=3, guidance=guidance, batch=3, denoise=False)
    assert found.redrawn == 3 * 4  # two of each batch, three times
    assert torch.allclose(flow.decode(found.latents, labels, guidance=guidance)[0], found.images, atol=1e-9)
    for first, count, rows in ((0, 3, [0, 2]), (3, 2, [3, 4])):
        assert torch.equal(found.latents[rows], draw(count, 3, 3, first)[[0, -1]])


@pytest.mark.parametrize("direction", ["density", "sampling"])
def test_what_is_asked_of_a_sampling_reaches_every_batch(make_flow, direction):
    flow = make_flow(direction=direction)
    told, checks = [], []
    found = flow.sample(
        5, batch=2, method="sequential", certify=True, denoise=False,
        progress=lambda done, n: told.append((done, n)), check=lambda: checks.append(1),
    )  # fmt: skip
    assert told == [(2, 5), (4, 5), (5, 5)] and len(checks) == 3 * 3  # batches and blocks
    assert len(found.inversions) == 3
    assert all(each.residual is not None and each.residual < 1e-9 for each in found.inversions) == (
        direction == "density"
    )

    class Stopped(Exception):
        pass

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        flow.sample(1, check=stop)


def test_an_exception_in_sampling_leaves_the_model_as_it_was(make_flow):
    flow = make_flow(num_classes=2)
    before = copy.deepcopy(flow.__dict__["_modules"])
    x = latents(flow, 2)
    with torch.no_grad():
        density = flow.log_prob(x, 1)

    def stop(done, n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.sample(4, 1, batch=2, progress=stop)
    with pytest.raises(QuinticError):
        flow.sample(4, 7)
    with torch.no_grad():
        assert torch.equal(flow.log_prob(x, 1), density)
        assert torch.equal(flow.log_prob(x, 1), density)
    assert set(dict(before.items())) == set(flow._modules)
    assert not any(isinstance(v, torch.Tensor) for m in flow.modules() for v in m.__dict__.values())


def test_batches_of_changing_size_do_not_disturb_each_other(make_flow):
    flow = make_flow()
    whole = flow.decode(latents(flow, 5), method="jacobi")[0]
    for n in (1, 5, 2, 4):
        assert torch.allclose(flow.decode(latents(flow, 5)[:n], method="window:4")[0], whole[:n], rtol=0, atol=1e-9)


def test_two_threads_sample_at_once(make_flow):
    flow = make_flow()
    expected = [flow.sample(3, seed=s, method="sequential").images for s in range(4)]
    found = {}

    def work(seed):
        found[seed] = flow.sample(3, seed=seed, method="jacobi").images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[s], expected[s], rtol=0, atol=1e-9) for s in range(4))


@pytest.mark.parametrize("measured", [2e-9, 5e-8, float("inf"), float("nan")])
def test_whatever_is_beyond_the_certificate_is_done_again_token_by_token(make_flow, monkeypatch, measured):
    flow = make_flow(blocks=2)
    z = latents(flow, 2)
    expected = flow.decode(z, method="sequential")[0]
    residuals = [measured, 1e-10, 0.9e-9]  # of the last block, of it again, and of the first
    monkeypatch.setattr(Workspace, "residual", lambda self, block, x, z: residuals.pop(0))
    found, inversion = flow.decode(z, method="jacobi")
    assert [report.finished_sequentially for report in inversion.blocks] == [True, False]
    assert [report.residual for report in inversion.blocks] == [1e-10, 0.9e-9] and not residuals
    assert inversion.blocks[0].sweeps > flow.tokens - 1
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_what_was_not_checked_has_no_residual(make_flow):
    flow = make_flow()
    z = latents(flow, 2)
    assert flow.decode(z, method="sequential")[1].residual is None
    assert 0 <= flow.decode(z, method="sequential", certify=True)[1].residual < 1e-9
    assert 0 <= flow.decode(z, method="jacobi")[1].residual < 1e-9


def test_volume_preserving_flows_are_inverted_too(make_flow):
    flow = make_flow(volume_preserving=True)
    z = latents(flow, 3)
    for method in ("sequential", "jacobi"):
        with torch.no_grad():
            back = flow(flow.decode(z, method=method)[0])[0]
        assert torch.allclose(back, z, rtol=0, atol=1e-10)
    x, _ = flow.decode(z, guidance=None)
    assert x.shape == z.shape


def test_no_images_are_no_images(make_flow):
    flow = make_flow()
    assert flow.decode(latents(flow, 0))[0].shape == (0, *flow.shape)


def test_an_impossible_number_of_images_or_labels_is_refused_before_anything_is_drawn(make_flow):
    flow, told = make_flow(num_classes=3), []
    for options in ({"n": 0}, {"n": -1}, {"n": 2, "batch": 0}, {"n": 2, "batch": -1}, {"n": 2.5}):
        with pytest.raises(ConfigError, match=r"(n|batch) = [-.\d]+; expected a whole number, 1 or more"):
            flow.sample(**options)
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0, 3]), 3):
        with pytest.raises(DataError, match="labels"):
            flow.sample(2, labels, batch=1, progress=lambda done, n: told.append(done))
    assert not told
    with pytest.raises(ConfigError, match="batch = 0"):
        plan_sampling(flow, 0)
    image = torch.zeros(flow.shape, dtype=F64)
    with pytest.raises(ConfigError, match="steps = 1; expected a whole number, 2 or more"):
        flow.interpolate(image, image, 1)


def test_a_plan_covers_all_blocks_and_changes_no_image(make_flow):
    flow = make_flow((1, 12, 12), num_classes=2)
    plan = plan_sampling(flow, 2, guidance=Guidance(1.0))
    assert len(plan.windows) == 3
    for window, seconds, sweeps in zip(plan.windows, plan.seconds, plan.sweeps, strict=True):
        assert seconds[window] <= seconds[1]
        assert seconds[window] == min(seconds.values()) or window == 1
        assert sweeps[1] == 35
        assert all(count <= 35 for count in sweeps.values())
    assert "block 2" in plan.table()
    one = flow.sample(2, 1, method=plan, guidance=Guidance(1.0), denoise=False)
    other = flow.sample(2, 1, method="sequential", guidance=Guidance(1.0), denoise=False)
    assert torch.allclose(one.images, other.images, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match="3 blocks"):
        make_flow((1, 12, 12), blocks=2).sample(1, method=plan)


def test_a_plan_is_kept_for_each_batch_size_and_guidance(make_flow):
    flow = make_flow(num_classes=2)
    one, row = plan_for(flow, 1, None, None), flow.rows(1, 1)
    assert plan_for(flow, 1, None, Guidance(0.0)) is one  # which is none
    others = [
        plan_for(flow, 3, None, None),
        plan_for(flow, 3, row, Guidance(1.0)),
        plan_for(flow, 3, row, Guidance(2.0)),
    ]
    assert [plan.batch for plan in (one, *others)] == [1, 3, 3, 3] and len(set(map(id, others))) == 3
    assert plan_for(flow, 1, None, None) is one and plan_for(flow, 3, row, Guidance(2.0)) is others[2]


@pytest.mark.parametrize("method", ["jacobbi", "window:", "window:0", "window:x", ""])
def test_an_unknown_method_is_refused(make_flow, method):
    with pytest.raises(ConfigError, match="method"):
        make_flow().sample(1, method=method)
