"""The figures of docs/posts: files that are whole, drawn by the code that is there, showing what the pages say."""

import re
import xml.etree.ElementTree as ET
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from docs.figures import NAMES, aux_loss, clipping, cur, ddcm, loss_free, moonlight, spectral_decay, tarflow

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images" / "posts"


def paths(svg: str) -> list[list[float]]:
    """Coordinates of every line."""
    return [[float(v) for v in re.findall(r"-?[\d.]+", d)] for d in re.findall(r'class="line"[^>]* d="([^"]+)"', svg)]


def test_one_file_for_every_figure():
    assert {path.stem for path in IMAGES.glob("*.svg")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_whole_and_readable_on_light_and_dark(name):
    svg = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img" and root.get("aria-label")
    assert "prefers-color-scheme: dark" in svg and "<script" not in svg and "href" not in svg
    drawn = svg.split("</style>")[1]
    assert "nan" not in drawn and "inf" not in drawn.replace("infinity", "")
    assert len(paths(svg)) >= 3


@pytest.mark.parametrize("name", ["muon", "moonlight", "moe_geometry"])
def test_the_code_draws_the_file(name):
    old, new = (
        paths((IMAGES / f"{name}.svg").read_text(encoding="utf-8")),
        paths(import_module(f"docs.figures.{name}").figure()),
    )
    assert len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        assert len(a) == len(b) and np.allclose(a, b, atol=2.0)  # of 400 pixels


def test_only_the_moonlight_factor_keeps_the_size_of_an_update():
    assert moonlight.update_rms(32, 128, "moonlight") == pytest.approx(0.2, rel=0.05)
    assert moonlight.update_rms(128, 512, "moonlight") == pytest.approx(0.2, rel=0.05)
    assert moonlight.update_rms(32, 128, "keller") == pytest.approx(
        2 * moonlight.update_rms(128, 512, "keller"), rel=0.1
    )
    assert 0.2 < moonlight.adam_rms(60) < 0.26


def test_spectral_decay_cuts_the_top_and_frobenius_everything(monkeypatch):
    monkeypatch.setattr(spectral_decay, "STEPS", 300)
    none, frobenius, spectral = (spectral_decay.spectrum(**spectral_decay.ARMS[name]) for name in
                                 ("no decay", "Frobenius", "spectral"))  # fmt: skip
    assert spectral[0] < 0.8 * none[0] and frobenius[0] < spectral[0]
    assert spectral[20] > 1.5 * frobenius[20]  # the middle of the spectrum


def test_norms_of_gradients_do_not_grow_with_the_network(monkeypatch):
    monkeypatch.setattr(clipping, "STEPS", 60)
    (small, few), (large, many) = (clipping.norms(width) for width in (32, 256))
    assert many > 5 * few
    assert 0.5 < np.median(large[30:]) / np.median(small[30:]) < 2.0 and np.median(large[30:]) < 1.2


def test_a_larger_weight_of_the_auxiliary_loss_balances_more():
    ends = [np.mean(aux_loss.learn(weight, steps=80)[0][-20:]) for weight in (0.0, 0.1, 1.0)]
    assert ends[0] > 2 * ends[1] > 2 * ends[2]


def test_a_large_rate_oscillates_and_the_floored_rule_does_not():
    ends = {name: np.mean(loss_free.violations(loss_free.ARMS[name], 120)[-40:]) for name in loss_free.ARMS}
    assert ends["sign, 0.001"] > 2 * ends["rms, 0.001"]  # still on its way
    assert ends["floored-rms"] < 0.8 * min(ends["sign, 0.01"], ends["rms, 0.01"])


def test_two_blocks_are_better_than_one(monkeypatch):
    monkeypatch.setattr(tarflow, "EVERY", 60)
    (one,), (two,) = (tarflow.bits(*sizes, steps=60) for sizes in ((1, 2), (2, 1)))
    assert two < one < 8.5


def test_softmax_ends_at_the_true_step_and_argmax_beyond_it(monkeypatch):
    monkeypatch.setattr(ddcm, "TRIALS", 60)
    assert ddcm.carried(512, "softmax")[0] == pytest.approx(1.0, abs=0.1)
    assert ddcm.carried(512, "literal")[0] == pytest.approx(0.5, abs=0.1)
    assert ddcm.carried(512, "argmax")[0] > 1.6 > 1.0 > ddcm.carried(2, "argmax")[0]


def test_the_quality_rule_is_nearest_to_the_least_error():
    A = cur.pictures(200, 12)
    errors = {rule: cur.excess(A, 10, rule) for rule in cur.RULES}
    assert min(errors, key=errors.__getitem__) == "quality"
    assert errors["leverage-top"] > errors["uniform"] > errors["quality"] > 1.0
