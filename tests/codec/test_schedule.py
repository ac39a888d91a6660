import itertools
import math

import numpy as np
import pytest
from tests.codec.toys import samples, smooth_model

from quintic.codec import Curve, Plan, calibrate, paper_plan
from quintic.codec.chain import aim, run_chain
from quintic.codec.schedule import atoms_that_fit, matched_levels, most_atoms, preset_plan
from quintic.codec.selection import Grouped
from quintic.core import ConfigError, DataError


def curve():
    return Curve.from_information(smooth_model().information)


def test_a_measured_curve_is_the_exact_one():
    """I-MMSE: errors of the denoiser, integrated, against the mutual information of a Gaussian channel."""
    model = smooth_model()
    measured, exact = calibrate(model, samples(300)).knots, Curve.from_information(model.information).knots
    np.testing.assert_allclose(measured, exact, atol=0.02 * exact[-1])


def test_a_step_goes_as_far_as_its_bits_pay_for():
    """The exact model's error where a step begins, times its gain of snr, is what atoms carry of its bits.

    Two thirds, and a little more because the curve's slope is taken past the step's beginning.
    """
    model = smooth_model()
    plan = preset_plan(1, curve(), 144, 40)
    assert sum(plan.atoms) == 40 and plan.calls == 20 and plan.rule == "grouped"

    def half_error(log_snr):  # d information / d snr, of the exact curve
        step = 1e-3
        rise = (model.information(log_snr + step) - model.information(log_snr - step)) / math.log(2)
        return rise / (math.exp(log_snr + step) - math.exp(log_snr - step))

    shares = []
    for m, (level, following) in zip(plan.atoms, itertools.pairwise(plan.levels), strict=True):
        bits = math.ceil(math.log2(math.prod(Grouped(m).radices(144, joint=True))))
        cost = half_error(level / 256) * (math.exp(following / 256) - math.exp(level / 256))
        shares.append(cost / bits)
    assert 2 / 3 < shares[0] < 0.9  # two bits are gained far past the beginning
    assert all(2 / 3 < share < 0.76 for share in shares[1:])


def test_levels_stay_on_the_curve_and_rise_whatever_it_is():
    step = Curve((0,) * 40 + (640,) * 41)  # all information within a quarter of log_snr
    for known in (step, Curve((0,) * 80 + (1,)), Curve(tuple(range(0, 81 * 10**6, 10**6)))):
        for bits in ([1] * 30, [10**6] * 30, [1, 10**9, 1]):
            levels = matched_levels(known, bits)
            assert levels[0] == -2560 and all(a < b for a, b in itertools.pairwise(levels))
            assert levels[-1] <= 2560 + len(bits)


def test_levels_are_inverse_to_the_curve_and_whole():
    known = curve()
    for i in (1, 30, 60, 79):
        level = known.level(known.knots[i], 64)
        assert abs(level - known.levels()[i]) <= 1 or known.knots[i] == known.knots[i - 1]
    assert known.level(10**9) == 2560 and known.level(0) == -2560


@pytest.mark.parametrize("joint", [True, False])
def test_as_many_atoms_as_fit(joint):
    for bits in (0, 5, 9, 100, 333, 5000, 10**6):
        atoms = atoms_that_fit(1, 144, bits, joint=joint)
        assert preset_plan(1, curve(), 144, atoms).image_bits(144, joint=joint) <= bits
        if atoms < most_atoms(1, 144):
            assert preset_plan(1, curve(), 144, atoms + 1).image_bits(144, joint=joint) > bits


def test_matched_steps_beat_the_papers_at_equal_bits_and_calls():
    """Design finding 3.1, on the exact model: 2 dB and more."""
    x, model = samples(40), smooth_model()

    def quality(plan):
        out = run_chain(model, plan, len(x), aim(plan, lambda x0, noisy, level: x - x0, []))
        return 10 * np.log10(4 / np.square(out - x).mean((1, 2, 3))).mean()

    paper = paper_plan(21, 256)
    matched = preset_plan(1, curve(), 144, atoms_that_fit(1, 144, paper.image_bits(144)))
    assert matched.image_bits(144) <= paper.image_bits(144) == 160 and matched.calls < paper.calls
    assert quality(matched) > quality(paper) + 2.0


def test_the_papers_levels_are_those_of_the_linear_schedule():
    plan = paper_plan(1000, 64)
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - beta)
    np.testing.assert_allclose(np.array(plan.levels[::-1]) / 256, np.log(abar / (1 - abar)), atol=0.5 / 256 + 1e-9)
    assert len(plan.atoms) == 999  # sigma_1 = 0: T - 1 integers
    assert paper_plan(2, 64).levels == (plan.levels[0], plan.levels[-1])
    for calls in (1, 1001):
        with pytest.raises(ConfigError, match="2 to 1000 steps"):
            paper_plan(calls, 64)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"levels": (3, 3), "atoms": (1,)}, "must rise"),
        ({"levels": (1, 2), "atoms": (1, 1)}, "need 1 counts"),
        ({"levels": (1, 2), "atoms": (1,), "book": "gausian", "size": 4}, "did you mean 'gaussian'"),
        ({"levels": (1, 2), "atoms": (1,), "book": "gaussian"}, "size of a codebook"),
        ({"levels": (1, 2), "atoms": (2,), "rule": "single"}, "one atom a step"),
        ({"levels": (1, 2), "atoms": (1,), "rule": "pursuit"}, "coefficient bits"),
        ({"levels": (1, 40000), "atoms": (1,)}, "-128"),
        ({"levels": (-40000, 1), "atoms": (1,)}, "-128"),
        ({"levels": (1, 2, 3), "atoms": (1, 1), "called": ()}, "calls of a plan"),
        ({"levels": (1, 2, 3), "atoms": (1, 1), "called": (1, 2)}, "calls of a plan"),
        ({"levels": (1, 2, 3), "atoms": (1, 1), "called": (0, 0)}, "calls of a plan"),
        ({"levels": (1, 2, 3), "atoms": (1, 1), "called": (0, 3)}, "calls of a plan"),
        ({"levels": (1, 2), "atoms": (1,), "single": True}, "single precision"),
    ],
)
def test_impossible_plans_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Plan(**fields)


def test_impossible_curves_are_refused():
    with pytest.raises(ConfigError, match="81 whole numbers"):
        Curve((0, 1))
    with pytest.raises(ConfigError, match="tell nothing"):
        Curve((0,) * 81)
    with pytest.raises(DataError, match=r"expected images \(n, 1, 12, 12\)"):
        calibrate(smooth_model(), np.zeros((1, 1, 3, 3), np.float32))


def test_steps_without_a_code_cost_nothing():
    plan = Plan((-500, 0, 500), (0, 2))
    assert plan.image_bits(144) == (math.comb(144, 2) * 4 - 1).bit_length()
    assert [len(list(g)) for _, g in itertools.groupby(plan.atoms)] == [1, 1]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("dimension", [3, 144, 784])
def test_as_many_atoms_as_fit_are_taken(dimension, joint):
    def bits(atoms):
        return preset_plan(2, curve(), dimension, atoms).image_bits(dimension, joint=joint)

    known = [bits(atoms) for atoms in range(min(most_atoms(2, dimension), 400) + 1)]
    for room in range(0, known[-1] // 2, 7):
        most = max(atoms for atoms, size in enumerate(known) if size <= room)
        assert atoms_that_fit(2, dimension, room, joint=joint) == most
