"""The race's protocol on made-up loss surfaces whose answers are known."""

import math

import pytest

from quintic.engine.race import Arm, Finish, run_race

ARMS = [Arm("fast", ("a",)), Arm("slow", ("b",))]
BEST = {"fast": 0.02, "slow": 0.16}


def surface(arm, lr, seed, fraction):
    """Loss falls like 1 / steps; the best rate is known; seeds shift it."""
    power = {"fast": 2.0, "slow": 4.0}[arm.name]
    if lr > 1:
        return Finish(math.inf, 1.0, 100)
    loss = 1.0 + math.log2(lr / BEST[arm.name]) ** 2 + power / (10 * fraction) + 0.01 * seed
    return Finish(loss, fraction * (3.0 if arm.name == "fast" else 2.0), int(100 * fraction))


def test_rates_are_swept_until_interior():
    calls = []
    race = run_race(lambda *a: calls.append(a) or surface(*a), ARMS, start_lrs=[0.01, 0.02], seeds=[0, 1], match=False)
    fast, slow = race.arms
    assert (fast.best_lr, slow.best_lr) == (0.02, 0.16)
    assert fast.interior and slow.interior
    assert sorted(fast.sweep) == [0.01, 0.02, 0.04] and sorted(slow.sweep) == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    assert {call[2] for call in calls if call[1] != BEST[call[0].name]} == {0}  # only the first seed tunes


def test_an_optimum_out_of_reach_is_said():
    notes = []
    race = run_race(lambda a, lr, s, f: Finish(-lr, 1.0, 1), ARMS[:1], start_lrs=[1.0], seeds=[0], note=notes.append)
    assert race.arms[0].told == "-8.0000" and "+-" not in notes[-1]  # one seed has no spread
    assert not race.arms[0].interior and len(race.arms[0].sweep) == 5


def test_means_spread_winner_and_matching():
    race = run_race(surface, ARMS, start_lrs=[0.02, 0.08], seeds=[0, 1, 2])
    assert race.winner.name == "fast"
    assert race.winner.mean == pytest.approx(1.0 + 0.2 + 0.01) and race.winner.spread == pytest.approx(0.01)
    assert race.winner.told == "1.2100 +- 0.0100"
    (match,) = race.matches
    # 2 / (10 f) = 4 / 10 at f = 1/2, in half the steps, each 1.5 times as long.
    assert match["step_ratio"] == pytest.approx(0.5, abs=0.01)
    assert match["time_ratio"] == pytest.approx(0.75, abs=0.02)
    assert match["step_ratios"] == pytest.approx([0.5] * 3, abs=0.01)  # a seed shifts both losses alike
    assert race.to_json()["winner"] == "fast"


@pytest.mark.parametrize(("tilt", "last"), [(0.09, 0.96), (0.15, math.nan)])
def test_ratios_of_seeds_are_against_the_others_own_loss_with_that_seed(tilt, last):
    def tilted(arm, lr, seed, fraction):
        loss = 0.2 / fraction if arm.name == "fast" else 0.3 - tilt * (seed - 1)
        return Finish(loss + math.log2(lr / BEST[arm.name]) ** 2, fraction, 1)

    race = run_race(tilted, ARMS, start_lrs=[0.02, 0.16], seeds=[0, 1, 2])
    (match,) = race.matches
    assert match["step_ratio"] == pytest.approx(2 / 3, abs=0.005)
    # The first seed's crossing lies below the shortest run, whose fraction stands for it.
    assert match["step_ratios"] == pytest.approx([0.6, 2 / 3, last], abs=0.005, nan_ok=True)
    assert match["losses"]["0.6"] == pytest.approx([1 / 3] * 3)


def test_divergence_is_a_loss_and_not_an_end():
    race = run_race(surface, ARMS[:1], start_lrs=[0.02, 0.04, 4.0, 0.01], seeds=[0])
    assert race.arms[0].sweep[4.0] == math.inf and race.arms[0].best_lr == 0.02


def test_an_arm_that_diverges_loses_and_the_others_are_compared_all_the_same():
    def broken(arm, lr, seed, fraction):
        if arm.name == "wild":
            return Finish(math.inf, 0.0, 100)
        if arm.name == "moody" and seed == 1:
            return Finish(math.inf, 0.0, 100)
        return surface(Arm("slow" if arm.name == "slow" else "fast", ()), lr, seed, fraction)

    said = []
    arms = [Arm("wild", ()), Arm("moody", ()), *ARMS]
    race = run_race(broken, arms, start_lrs=[0.02, 0.08], seeds=[0, 1, 2], note=said.append)
    assert race.winner.name == "fast" and [arm.diverged for arm in race.arms] == [True, True, False, False]
    assert [match["against"] for match in race.matches] == ["slow"]
    assert math.isnan(race.arms[0].spread) and math.isnan(race.arms[0].seconds_per_step)
    assert race.arms[1].seconds_per_step == 0.03  # of the seeds that came to an end
    assert any(words.startswith("wild: best lr") and words.endswith("diverged") for words in said)
