"""Schedules against published numbers and against the properties that make them safe."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from quintic.core import ConfigError
from quintic.linalg import polar_express_coefficients, resolve_schedule
from quintic.linalg.coefficients import PRESETS


def run(schedule, x):
    for a, b, c in schedule:
        x = x * (a + x * x * (b + x * x * c))
    return x


# arXiv 2505.16932, undamped, l = 1e-3, cushion 0.0240732...; six published digits, the later ones converged.
PAPER = [
    (8.28721, -23.5959, 17.3004),
    (4.10706, -2.94785, 0.544843),
    (3.94869, -2.90890, 0.551819),
    (3.31842, -2.48849, 0.510049),
    (2.30065, -1.66890, 0.418807),
    (1.89130, -1.26800, 0.376804),
    (1.87500, -1.25000, 0.375000),
    (1.875, -1.25, 0.375),
]
# First four steps of the set in use by modded-nanogpt, dion and nanochat: safety 1.02, cushion 0.02.
DAMPED = (8.156554524902461, -22.48329292557795, 15.878769915207462)


def test_remez_reproduces_the_published_polar_express_triples():
    np.testing.assert_allclose(polar_express_coefficients(1e-3, 8, safety=1.0), PAPER, rtol=5e-6)


def test_remez_reproduces_the_damped_set_to_nine_digits():
    first = polar_express_coefficients(1e-3, 5, safety=1.02, cushion=0.02)[0]
    np.testing.assert_allclose(first, DAMPED, rtol=1e-9)


def test_every_stage_equioscillates():
    """Chebyshev: the best approximation of 1 has degree/2 + 1 alternating extreme errors of equal size."""
    for degree, extrema in ((3, 3), (5, 4)):
        low, high = 0.05, 1.0
        for triple in polar_express_coefficients(low, 3, degree=degree, safety=1.0, cushion=0.0):
            x = np.linspace(low, high, 200_001)
            error = 1.0 - run([triple], x)
            peaks = [error[0], *error[1:-1][np.diff(np.sign(np.diff(error))) != 0], error[-1]]
            assert len(peaks) == extrema
            np.testing.assert_allclose(np.abs(peaks), abs(error[0]), rtol=1e-6)
            assert all(p * q < 0 for p, q in itertools.pairwise(peaks))
            low, high = 1 - error.max(), 1 + error.max()


def test_greedy_schedule_beats_every_perturbation_of_its_worst_error():
    x = np.geomspace(1e-2, 1, 4001)
    best = np.abs(1 - run(polar_express_coefficients(1e-2, 3, safety=1.0, cushion=0.0), x)).max()
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = np.array(polar_express_coefficients(1e-2, 3, safety=1.0, cushion=0.0))
        other *= 1 + 1e-3 * rng.standard_normal(other.shape)
        assert np.abs(1 - run(other, x)).max() > best


def test_degree_three_has_no_fifth_power_and_converges():
    schedule = polar_express_coefficients(1e-2, 8, degree=3, safety=1.0)
    assert all(c == 0 for _, _, c in schedule)
    assert np.abs(1 - run(schedule, np.geomspace(1e-2, 1, 1001))).max() < 1e-6


def test_the_last_stage_is_not_damped():
    damped, whole = (polar_express_coefficients(1e-3, 4, safety=s) for s in (1.01, 1.0))
    assert damped[-1] == whole[-1] and damped[0] != whole[0]


def test_safety_keeps_inputs_above_one_in_range():
    x = np.linspace(1e-3, 1.02, 5001)
    assert run(polar_express_coefficients(1e-3, 5, safety=1.02), x).max() < 1.2
    assert np.abs(run(polar_express_coefficients(1e-3, 5, safety=1.0), 1.05)) > 2  # undamped: diverges


# Range of [1e-3, 1] and of [1e-2, 1], slope at 0: section 1.3 of the notes, exact arithmetic.
@pytest.mark.parametrize(
    ("name", "low3", "low2", "high", "high2", "slope"),
    [
        ("keller", 0.471, 0.682, 1.202, 1.134, 485),
        ("quintic", 0.475, 0.978, 1.145, 1.032, 493),
        ("su", 0.612, 0.951, 1.050, 1.050, 662),
    ],
)
def test_presets_have_their_published_ranges(name, low3, low2, high, high2, slope):
    schedule = resolve_schedule(name)
    y = run(schedule, np.geomspace(1e-3, 1, 20_001))
    assert y.min() == pytest.approx(low3, abs=2e-3)
    assert y.max() == pytest.approx(high, abs=2e-3)
    y = run(schedule, np.geomspace(1e-2, 1, 20_001))
    assert (y.min(), y.max()) == pytest.approx((low2, high2), abs=6e-4)
    assert np.prod([a for a, _, _ in schedule]) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_every_preset_stays_positive_and_bounded_a_little_above_one(name, extra):
    schedule = resolve_schedule(name, len(resolve_schedule(name)) + extra)
    y = run(schedule, np.concatenate([np.geomspace(1e-6, 1e-2, 200), np.linspace(1e-2, 1.01, 2000)]))
    assert (y > 0).all()
    assert y.max() < 1.3


def test_exact_is_exact_and_listed_schedules_polish_when_lengthened():
    x = np.geomspace(1e-3, 1.01, 2001)
    np.testing.assert_allclose(run(resolve_schedule("exact"), x), 1.0, atol=1e-6)
    for name in ("quintic", "su"):
        np.testing.assert_allclose(run(resolve_schedule(name, 9), x), 1.0, atol=1e-6)


def test_explicit_coefficients():
    triple = (2.0, -1.5, 0.5)
    assert resolve_schedule(triple, 3) == (triple,) * 3
    assert resolve_schedule(triple) == (triple,) * 5
    assert resolve_schedule([triple, list(triple)]) == (triple,) * 2
    assert resolve_schedule([triple, triple], 4) == (triple,) * 2 + resolve_schedule("taylor", 2)
    assert resolve_schedule(np.array([triple])) == (triple,)


def test_divergent_schedules_are_refused():
    resolve_schedule(polar_express_coefficients(1e-3, 5, safety=1.01))
    resolve_schedule([(1.98, 0.0, 0.0)])  # 1.01 goes to 1.9998
    with pytest.raises(ConfigError, match="must stay in"):
        resolve_schedule([(1.99, 0.0, 0.0)])
    with pytest.raises(ConfigError, match="singular value"):
        resolve_schedule(polar_express_coefficients(1e-3, 5, safety=1.0))
    with pytest.raises(ConfigError, match="singular value"):
        resolve_schedule((4.0, -6.0, 4.0))
    with pytest.raises(ConfigError, match="singular value"):  # flips the sign above 1
        resolve_schedule([(3.0, -3.2, 0.0)] * 2)


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("quintc", None, "did you mean 'quintic'"),
        ("quintic", 3, "cannot be cut to 3"),
        ("keller", 0, "from 1 to 100"),
        ("keller", 2.5, "from 1 to 100"),
        ("keller", True, "from 1 to 100"),
        ([1.0, 2.0], None, "triple"),
        ([[1.0, 2.0], [3.0, 4.0]], None, "triple"),
        ([], None, "triple"),
        (["a", "b", "c"], None, "triple"),
        (None, None, "triple"),
    ],
)
def test_wrong_coefficients_say_what_is_wrong(coefficients, steps, message):
    with pytest.raises(ConfigError, match=message):
        resolve_schedule(coefficients, steps)


@pytest.mark.parametrize(
    "arguments", [{"l": 0.0}, {"l": 2.0}, {"steps": 0}, {"degree": 7}, {"safety": 0.9}, {"cushion": 1.0}]
)
def test_generator_refuses_nonsense(arguments):
    with pytest.raises(ConfigError, match="expected"):
        polar_express_coefficients(**arguments)


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(-6, 0),
    steps=st.integers(1, 12),
    degree=st.sampled_from([3, 5]),
    cushion=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
)
def test_generated_schedules_are_centred_about_one_on_their_whole_interval(exponent, steps, degree, cushion):
    low = 10.0**exponent
    schedule = polar_express_coefficients(low, steps, degree=degree, safety=1.0, cushion=cushion)
    y = run(schedule, np.geomspace(low, 1.0, 5001))
    assert y.min() >= run(schedule, low) - 1e-5
    assert y.max() <= 2.0 - run(schedule, low) + 1e-5
