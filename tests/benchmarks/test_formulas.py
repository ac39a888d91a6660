"""The check of formulas: its measures agree with closed forms, and a small run is written up."""

import json

import numpy as np
import pytest
from benchmarks import formulas, lowrank, moe_speed
from benchmarks.__main__ import RESULTS


def test_the_error_of_a_polynomial_is_that_of_its_values():
    assert formulas.sign_error((1.0, 0.0, 0.0), 7, np.array([0.5, 1.0])) == pytest.approx(0.125)
    assert formulas.sign_error((1.5, -0.5, 0.0), 40, np.array([0.1, 0.9])) == pytest.approx(0.0, abs=1e-12)


def test_the_norm_comes_to_its_bound_and_not_beyond():
    assert 0.9 < formulas.norm_over_bound(0.5, 0.01, 0) <= 1 + 1e-6
    assert formulas.norm_over_bound(0.05, 3.0, 0, steps=50) == pytest.approx(1.0, abs=0.2)


def test_a_bias_wakes_the_codes_that_nobody_chose():
    assert formulas.codes_used(False, 0)[0] < 8
    used, error = formulas.codes_used(True, 0)
    assert used == 8 and error == pytest.approx(0.005, abs=1e-3)


def test_assignment_is_compared_with_the_best():
    assert formulas.assignment(16, 0) == pytest.approx(0.0, abs=1e-12)


def test_the_layers_of_a_trained_model_are_cut():
    errors = formulas.trained_split(steps=2)
    for layer in errors:
        assert layer["best"][4] <= layer["norm"][4] <= 1.5 and layer["norm"][formulas.EXPERTS] < 1e-6
        assert formulas.gained([layer], 4, "best") == pytest.approx(1.0)
        assert formulas.gained([layer], 4, "random") == 0.0


def test_it_is_written_up(monkeypatch):
    monkeypatch.setattr(formulas, "SEEDS", (0, 1))
    monkeypatch.setattr(formulas, "SIZES", (4, 64))
    monkeypatch.setattr(formulas, "TABLE", formulas.TABLE[6:8])
    monkeypatch.setattr(formulas, "norm_over_bound", lambda *_: 0.5)
    monkeypatch.setattr(formulas, "assignment", lambda *_: 0.25)
    monkeypatch.setattr(formulas, "codes_used", lambda balanced, seed: (8 if balanced else 2 + seed, 0.1))
    monkeypatch.setattr(formulas, "carried", lambda size, rule: (1.0 if rule == "softmax" else 2.0, 0.01))
    split = {rule: [v] * 17 for rule, v in (("best", 0.1), ("norm", 0.2), ("router", 0.3), ("random", 0.5))}
    monkeypatch.setattr(formulas, "trained_split", lambda: [split, split])
    result = json.loads(json.dumps(formulas.run()))
    text = formulas.section(result)
    assert "| trained language model | 4 | 0.100 | 0.200 | 0.300 | 0.500 | 75% | 50% |" in text
    claims = formulas.claims({**result, "sign": [dict(result["sign"][0], steps=3), *result["sign"]]})
    holds = {claim.claim: claim.holds for claim in claims}
    assert holds["Assignment under capacities by the bias of a balancer is optimal"] == "no"
    assert holds["The same bias cures the collapse of a codebook"] == "yes"
    assert holds["A softmax of inner products tends to DDPM as K grows, argmax does not"] == "yes"
    assert holds["Weights by the distance, as written in the post, tend to DDPM"] == "no"


@pytest.mark.parametrize("benchmark", [lowrank, moe_speed])
def test_a_missed_bar_is_a_no(benchmark):
    result = json.loads((RESULTS / f"{benchmark.__name__.split('.')[-1]}.json").read_text())
    before = [claim.holds for claim in benchmark.claims(result)]
    assert "yes" in before
    if benchmark is lowrank:
        result["tolerance"]["above"] = 1
        result["quality"]["digits, k = 10"]["quality"] = 9.0
    else:
        for row in result["shapes"]:
            row["zipf / balanced"] = 9.0
    after = [claim.holds for claim in benchmark.claims(result)]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == (3 if benchmark is lowrank else 1)
