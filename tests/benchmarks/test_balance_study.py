"""The study of balancing from end to end at a toy size, and its numbers by hand."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from benchmarks import balance, balance_rules, experts_or_dense
from benchmarks.balance import Arm, Book, balance_numbers, balanced_from, train
from benchmarks.claims import claims_section

TOY = Arm(steps=10, batch=1, experts=4)


@pytest.fixture
def short(monkeypatch):
    """A short validation."""
    whole = balance.text
    monkeypatch.setattr(balance, "text", lambda name: whole(name)[:70_000])
    monkeypatch.setattr(balance, "VALIDATION", 1000)


def test_the_book_remembers_and_the_study_reads_it(short, tmp_path, monkeypatch):
    arms = {"rules": {"sign": (1e-3,), "floored-rms": (1e-3, 1e-2)}, "weights": (1e-2,), "seeds": (0, 1)}
    result = balance.run(Book(tmp_path), TOY, **arms)
    monkeypatch.setattr(balance, "train", None)  # all is known now
    assert balance.run(Book(tmp_path), TOY, **arms)["finalists"] == result["finalists"]
    words = balance.section(result) + claims_section(balance.claims(result))
    assert "floored-rms 0.01" in words and "nan" not in words
    losses = {"aux": [1.2, 1.301], "sign": [0.9, 1.001]}
    for arm in result["finalists"]:
        arm["losses"] = losses.get(arm["balance"], [1.0, 1.1])
    words = balance.section(result)
    assert "higher than without balancing for: aux 0.01. It is lower for: sign 0.001." in words
    for svg in balance.plots(result).values():
        ElementTree.fromstring(svg)


def test_experts_or_dense_at_equal_time(short, tmp_path, monkeypatch):
    monkeypatch.setattr(experts_or_dense, "ROUNDS", 1)
    result = experts_or_dense.run(Book(tmp_path), TOY, seeds=(0, 1), steps=4)
    arms = result["arms"]
    ratio = arms["dense"]["tokens_per_second"] / arms["experts"]["tokens_per_second"]
    assert arms["dense, equal time"]["steps"] == pytest.approx(TOY.steps * ratio, abs=0.51)
    assert arms["dense"]["steps"] == arms["experts"]["steps"] == TOY.steps
    words = experts_or_dense.section(result) + claims_section(experts_or_dense.claims(result))
    assert "dense, equal time" in words and "nan" not in words


def test_a_run_is_repeatable_and_learns(short):
    first, again = (train(Arm(steps=10, batch=4, experts=4, balance="quantile", rate=0.3)) for _ in range(2))
    assert first["loss"] == again["loss"] < math.log(90) and first["curve"] == again["curve"]
    assert len(first["global_max_vio"]) == 2 and "max_vio" not in train(Arm(steps=2, batch=2, dense=True))


def test_floor_of_the_text_is_what_is_left_after_the_means_are_made_even():
    """Two experts in turn busy by half: uneven means cost MaxVio but not the floor."""
    swing = np.array([0.1, -0.1] * 10)
    even = np.stack([0.5 * (1 + swing), 0.5 * (1 - swing)], axis=1)[:, None]
    uneven = even * np.array([1.5, 0.5])
    uneven /= uneven.sum(axis=2, keepdims=True)
    assert balance_numbers(even, [0] * 20)["max_vio"] == pytest.approx(0.1)
    assert balance_numbers(even, [0] * 20)["text_floor"] == pytest.approx(0.1)
    found = balance_numbers(uneven, [0] * 20)
    assert found["max_vio"] > 0.4 and found["text_floor"] == pytest.approx(0.1, rel=0.7)


def test_balanced_from():
    assert balanced_from([3.0, 0.4, 2.0, 0.4, 0.3], 0.5) == 13
    assert balanced_from([0.4], 0.5) == 10
    assert math.isinf(balanced_from([0.4, 0.6], 0.5)) and math.isinf(balanced_from([], 0.5))


def test_rules_on_a_simulated_router():
    size = balance_rules.Size(256, 8, 2)
    rates = {"sign": (1e-3, 1e-1), "floored-rms": (1e-2, 1e-1), "quantile": (0.3,)}
    result = balance_rules.run((size,), rates, steps=60)
    found = {(row["rule"], row["rate"]): row["late"] / row["floor"] for row in result["rules"]}
    assert found["floored-rms", 0.1] < 1.5 < 3 < found["sign", 0.1]
    assert result["cuts"][0]["late"] > 0
    words = balance_rules.section(result) + claims_section(balance_rules.claims(result))
    assert "floored-rms" in words and "nan" not in words
    for svg in balance_rules.plots(result).values():
        ElementTree.fromstring(svg)


def test_longest_range():
    assert balance_rules.longest_range([(0.1, 1.2), (0.3, 9.0), (0.01, 1.4), (0.001, 3.0)]) == (0.01, 0.1)
    assert balance_rules.longest_range([(0.1, 9.0)]) == (0.0, 0.0)
    assert balance_rules.longest_range([(1.0, 1.0), (2.0, 9.0), (3.0, 1.0), (30.0, 1.0)]) == (3.0, 30.0)
