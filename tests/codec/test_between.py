"""Predictions between calls of the network."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.codec.toys import picture, samples, smooth_model, toy_codec

from quintic.codec import Codec, Curve, Plan
from quintic.codec.between import Between, Errors, _transform
from quintic.codec.chain import aim, replay, run_chain
from quintic.codec.container import read_parts
from quintic.codec.models import as_model
from quintic.codec.schedule import PRESETS, atoms_that_fit, preset_number, preset_plan
from quintic.core import CodecError, ConfigError
from quintic.diffusion import GaussianDenoiser
from quintic.diffusion.residuals import band_of, transforms


class Counted:
    """A denoiser that remembers at which levels it was asked."""

    def __init__(self, denoiser):
        self.denoiser, self.asked = denoiser, []
        self.shape, self.fingerprint = denoiser.shape, denoiser.fingerprint

    def predict_x0(self, x, log_snr):
        self.asked.append(log_snr)
        return self.denoiser.predict_x0(x, log_snr)


def banded_model(channels):
    """Gaussian images with one variance in each band, for which the two tables are the whole truth."""
    colours, rows, columns = transforms((channels, 12, 10))
    bands = band_of(12)[:, None] + band_of(10)[None, :] + 2 * np.arange(channels)[:, None, None]
    basis, _ = torch.linalg.qr(torch.from_numpy(np.kron(colours, np.kron(rows, columns)).T.copy()))
    variances = torch.from_numpy(0.2 * 0.6 ** bands.ravel())
    return GaussianDenoiser(torch.zeros(channels, 12, 10), basis, variances)


def noisy(denoiser, count, level, following):
    """Pictures of the model, and what a chain might see at two levels."""
    d = len(denoiser.spectrum)
    normal = torch.randn(3, count, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    x0 = normal[0] * np.sqrt(denoiser.spectrum.numpy()) @ denoiser.basis.double().numpy().T
    snr = np.exp([level / 256, following / 256])
    eta = snr[0] * x0 + np.sqrt(snr[0]) * normal[1]
    etas = eta, eta + (snr[1] - snr[0]) * x0 + np.sqrt(snr[1] - snr[0]) * normal[2]
    return x0, [e / np.sqrt(s * (1 + s)) for e, s in zip(etas, snr, strict=True)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level,following", [(-1024, -500), (0, 60), (0, 300), (1024, 1200), (512, 700)])
@pytest.mark.parametrize("single", [False, True])
def test_for_a_gaussian_of_bands_it_is_the_posterior_mean(channels, level, following, single):
    denoiser = banded_model(channels)
    shape = (-1, channels, 12, 10)
    _, (x, later) = noisy(denoiser, 20, level, following)

    def said(at, place):
        return denoiser.predict_x0(torch.from_numpy(at.reshape(shape)).float(), place / 256).numpy()

    first, truth = said(x, level), said(later, following)
    moved = Between(Errors(as_model(denoiser).curve, denoiser.shape, [level]), first, x, level).predict(
        later, following
    )
    inside = np.abs(truth) < 0.95
    # The error is taken a little larger than a Gaussian's, and halfway between two tables is a guess.
    assert np.square(moved - truth)[inside].mean() < 0.04 * np.square(first - truth)[inside].mean()


def test_where_predictions_are_sure_they_do_not_move():
    denoiser = banded_model(1)
    curve = as_model(denoiser).curve
    steady = dataclasses.replace(curve.residuals, sizes=((1,) + (256,) * 20,) * 5)
    _, (x, later) = noisy(denoiser, 5, 0, 500)
    first = np.clip(denoiser.predict_x0(torch.from_numpy(x.reshape(-1, 1, 12, 10)).float(), 0.0).numpy(), -0.9, 0.9)
    first[:, :, :6] = -1.0
    between = Between(Errors(dataclasses.replace(curve, residuals=steady), (1, 12, 10), [0]), first, x, 0)
    moved = between.predict(later, 500) - first
    assert np.abs(moved[:, :, :6]).max() < 0.01 < 0.1 < np.abs(moved[:, :, 6:]).max()


@pytest.mark.parametrize("shape", [(1, 5, 12), (3, 7, 6)])
@pytest.mark.parametrize("back", [False, True])
def test_the_transform_is_one_of_whole_numbers(shape, back):
    """Against Python's own integers, of any length."""
    x = np.random.default_rng(0).normal(size=(4, *shape)) * np.array([1e-9, 1.0, 0.0, 3e5])[:, None, None, None]
    found = _transform(x.reshape(4, -1), shape, back=back).reshape(x.shape)
    colours, rows, columns = (
        np.array([[int(v) for v in row] for row in (m.T if back else m) * 2**20], dtype=object)
        for m in transforms(shape)
    )

    def rounded(values):  # from units of 2^-20, to even at ties
        return np.vectorize(lambda v: round(v / 2**20) if abs(v) < 2**53 else 1 / 0, otypes=[object])(values)

    for image, out in zip(x, found, strict=True):
        power = int(np.frexp(np.abs(image).max())[1])
        whole = np.vectorize(lambda v: round(float(v)), otypes=[object])(np.ldexp(image, 21 - power))
        y = [rows.dot(rounded(channel.dot(columns.T))) for channel in whole]
        if shape[0] == 3:
            flat = np.stack([rounded(channel) for channel in y]).reshape(3, -1)
            y = list(colours.dot(flat).reshape(shape))
        exact = np.vectorize(float, otypes=[float])(np.stack(y))
        assert (np.ldexp(exact, power - 41) == out).all()


@pytest.mark.parametrize("shape", [(1, 5, 12), (3, 7, 6), (1, 64, 28), (3, 32, 32)])
@pytest.mark.parametrize("back", [False, True])
def test_in_single_precision_no_sum_of_the_transform_is_rounded(shape, back):
    """The largest magnitudes there can be, and usual ones, against sums of doubles."""
    matrices, d = transforms(shape), int(np.prod(shape))
    dense = np.kron(matrices[0], np.kron(matrices[1], matrices[2]))
    x = np.stack([np.sign(dense[:, 0] if back else dense[0]), np.random.default_rng(0).normal(size=d)])
    x = x.astype(np.float32) * np.float32([[0.999], [30.0]])
    shifts = [math.ceil(math.ceil(math.log2(side)) / 2) for side in shape]
    power = 2.0 ** np.frexp(np.abs(x).max(1))[1][:, None, None, None]
    steps = 2.0 ** (14 - max(shifts))
    y = x.reshape(2, *shape) / power * steps
    for axis in (2, 1, 0)[: 3 if shape[0] == 3 else 2]:
        whole = np.rint(matrices[axis] * 512)
        sums = np.moveaxis(np.tensordot(whole.T if back else whole, np.rint(y), (1, axis + 1)), 0, axis + 1)
        assert np.abs(sums).max() <= 2**24
        y = sums / 512 / 2 ** shifts[axis]
    found = _transform(x, shape, back=back)
    assert found.dtype == np.float32 and (found == (y * power / steps * 2 ** sum(shifts)).reshape(2, d)).all()
    exact = x @ (dense if back else dense.T)
    assert np.square(found - exact).mean() < 3e-3 * np.square(exact).mean()


def test_neighbours_do_not_change_a_bit():
    denoiser = banded_model(3)
    errors = Errors(as_model(denoiser).curve, denoiser.shape, [100])
    _, (x, later) = noisy(denoiser, 6, 100, 200)
    first = denoiser.predict_x0(torch.from_numpy(x.reshape(-1, 3, 12, 10)).float(), 100 / 256).numpy().clip(-1, 1)
    together = Between(errors, first, x, 100).predict(later, 200)
    for i in range(6):
        row = slice(i, i + 1)
        assert (Between(errors, first[row], x[row], 100).predict(later[row], 200) == together[row]).all()


@pytest.mark.parametrize("preset", [5, 6, 7, 8])
def test_calls_are_few_well_spread_and_the_last_level_has_one(preset):
    known, counted = as_model(smooth_model()).curve, Counted(smooth_model())
    for atoms in (1, PRESETS[preset].calls, 2 * PRESETS[preset].calls + 3, 400):
        plan = preset_plan(preset, known, 144, atoms)
        counted.asked.clear()
        run_chain(counted, plan, 1, aim(plan, lambda x0, x, level: samples(1) - x0, []), curve=known)
        assert len(plan.levels) == min(PRESETS[preset].levels, atoms + 1)
        assert len(counted.asked) == plan.calls == min(PRESETS[preset].calls, len(plan.levels))
        numbers = [plan.levels.index(round(256 * level)) for level in counted.asked]
        gaps = [b - a for a, b in pairwise(numbers)]
        assert numbers[0] == 0 and numbers[-1] == len(plan.levels) - 1
        if preset < 8:
            assert max(gaps) - min(gaps) <= 1
        else:  # denser at first, by a rounded line
            assert all(a <= b + 1 for a, b in pairwise(gaps)) and gaps[-1] <= 2.5 * len(plan.levels) / len(gaps)


def test_as_many_calls_and_bits_make_better_pictures():
    model, x = as_model(smooth_model()), samples(60)

    def error(preset, bits):
        plan = preset_plan(preset, model.curve, 144, atoms_that_fit(preset, 144, bits))
        assert plan.image_bits(144) <= bits
        choose = aim(plan, lambda x0, noisy, level: x - x0, [])
        return np.square(run_chain(model.denoiser, plan, 60, choose, curve=model.curve, batch=60) - x).mean()

    for bits in (400, 800):
        assert max(error(5, bits), error(8, bits)) < 0.9 * error(1, bits) and error(6, bits) < 0.8 * error(2, bits)


def test_a_chain_that_ends_between_calls_asks_the_network_once_more():
    known, counted = as_model(smooth_model()).curve, Counted(smooth_model())
    plan, record = preset_plan(8, known, 144, 79), []
    run_chain(counted, plan, 1, aim(plan, lambda x0, x, level: samples(1) - x0, record), curve=known)
    for cut in (4, 30, 31, 32, 33):
        counted.asked.clear()
        run_chain(counted, plan, 1, replay(plan, record[:cut]), curve=known)
        called = {plan.levels[i] / 256 for i in plan.called if i <= cut}
        assert set(counted.asked) == called | {plan.levels[cut] / 256} and len(counted.asked) == len(set(counted.asked))


def test_the_first_prediction_is_made_once_for_all_tiles_and_pictures():
    """x_T is the same for all: the answer is kept, for each arithmetic its own, and files do not depend on it."""
    counted, known = Counted(smooth_model()), as_model(smooth_model()).curve
    codec = Codec(counted, curve=known)
    for size in ((20, 15), (12, 12)):
        made = codec.code(picture(*size), target_bytes=90)
        assert counted.asked.count(-10.0) == 1 < counted.asked.count(counted.asked[1])
        assert Codec(counted.denoiser, curve=known).code(picture(*size), target_bytes=90).data == made.data
        assert codec.decode(made.data).tobytes() == made.image.tobytes()
    codec.code(picture(12, 12), target_bytes=90, exact=True)
    assert counted.asked.count(-10.0) == 2
    for seed in range(40):
        codec.code(picture(12, 12), plan=Plan((0,), (), rule="signed", seed=seed))
    assert counted.asked.count(0.0) >= 40 and len(codec._own.kept) <= 16


def test_models_without_residuals_keep_the_presets_of_before():
    whole = toy_codec()
    plain = Codec(smooth_model(), curve=Curve(as_model(smooth_model()).curve.knots))
    for name, old, new in (("standard", 1, 8), ("fast", 2, 6), ("fine", 3, 7), ("finest", 4, 4)):
        assert (preset_number(name, False), preset_number(name, True)) == (old, new)
    original = picture(20, 15)
    made = [codec.code(original, target_bytes=70) for codec in (plain, whole)]
    assert [read_parts(m.data).header.preset for m in made] == [1, 8]
    # A codec that knows residuals decodes files from before it did, but not the other way round.
    assert whole.decode(made[0].data).tobytes() == made[0].image.tobytes()
    with pytest.raises(CodecError, match="another model"):
        plain.decode(made[1].data)
    plan = preset_plan(5, as_model(smooth_model()).curve, 144, 60)
    with pytest.raises(ConfigError, match="cannot be stored"):
        plain.code(original, plan=plan)


def test_plans_whose_calls_do_not_fit_are_refused():
    plan = preset_plan(5, as_model(smooth_model()).curve, 144, 60)
    for called in ((), (1, 60), (0, 3, 3), (0, 61)):
        with pytest.raises(ConfigError, match="calls of a plan"):
            dataclasses.replace(plan, called=called)
    for unnamed in (plan, dataclasses.replace(plan, called=None, single=True)):
        with pytest.raises(ConfigError, match="stored"):
            toy_codec().code(picture(12, 12), plan=unnamed)
    with pytest.raises(ConfigError, match="single precision"):
        dataclasses.replace(plan, rule="signed", single=True)
