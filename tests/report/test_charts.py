"""The pieces of a chart: ticks, smoothing, thinning, and the heat map's colours."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quintic.report.charts import Series, line_chart, linear_ticks, log_ticks, smooth, thin, tick_labels
from quintic.report.experts import LIMIT, load_image, load_over_time

magnitudes = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-12)


@given(magnitudes, magnitudes)
def test_linear_ticks_are_even_few_and_enclose(a, b):
    low, high = sorted((a, b))
    ticks = linear_ticks(low, high, outward=True)
    tiny = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + tiny and ticks[-1] >= high - tiny
    assert 2 <= len(ticks) <= 10
    gaps = np.diff(ticks)
    assert gaps.min() > 0 and gaps.max() - gaps.min() <= 1e-6 * gaps.max()


@given(st.floats(1e-12, 1e12), st.floats(1.0, 1e9))
def test_log_ticks_are_few_and_enclose(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert ticks[0] <= low * 1.00001 and ticks[-1] >= low * ratio * 0.99999
    assert 2 <= len(ticks) <= 6
    assert np.all(np.diff(ticks) > 0)


@given(magnitudes, magnitudes)
def test_labels_of_different_ticks_differ(a, b):
    low, high = sorted((a, b))
    ticks = linear_ticks(low, high, outward=True)
    labels = tick_labels(ticks)
    assert len(labels) == len(ticks)
    if high - low > 1e-4 * max(abs(low), abs(high)) and high - low > 1e-6:
        assert len(set(labels)) == len(ticks)


@given(st.integers(1, 60), st.integers(0, 20), st.floats(-5, 5), st.floats(-5, 5))
def test_smoothing_keeps_a_straight_line(length, half, slope, offset):
    y = slope * np.arange(length) + offset
    np.testing.assert_allclose(smooth(y, half), y, atol=1e-8)


def test_smoothing_is_the_mean_of_the_window_and_leaves_gaps():
    y = np.random.default_rng(0).normal(size=50)
    y[20] = np.nan
    s = smooth(y, 3)
    assert s[10] == pytest.approx(y[7:14].mean())
    assert s[19] == pytest.approx(np.nanmean(y[16:23]))
    assert np.isnan(s[20]) and np.isfinite(np.delete(s, 20)).all()
    assert smooth(y, 3)[-20:].std() < y[-20:].std()


def test_a_spike_is_smoothed_where_it_is_and_nowhere_else():
    y = np.linspace(2.0, 1.0, 60)
    spiked = y.copy()
    spiked[3] = 1e25
    far = np.abs(np.arange(60) - 3) > 2
    assert smooth(spiked, 2)[far] == pytest.approx(smooth(y, 2)[far], rel=1e-12)


@given(st.integers(0, 9_999), st.integers(1, 3))
def test_thinning_keeps_real_points_the_ends_and_every_spike(at, seed):
    x = np.arange(1.0, 10_001.0)
    y = np.random.default_rng(seed).normal(size=len(x))
    y[at] = 50.0
    tx, ty = thin(x, y, columns=100)
    assert len(tx) <= 400
    assert np.all(np.diff(tx) > 0) and tx[0] == 1 and tx[-1] == 10_000
    assert np.array_equal(ty, y[tx.astype(int) - 1])
    assert ty.max() == 50.0 and ty.min() == y.min()


def test_a_lone_point_between_gaps_is_visible():
    chart = line_chart(
        [Series("a", np.arange(1.0, 6.0), np.array([1.0, np.nan, 2.0, np.nan, 3.0]))], unit="", label="lone"
    )
    assert chart.count("h0") == 3


def decode(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGBA")).astype(int)


def test_heat_map_colours_mean_what_the_legend_says():
    pixels = decode(load_image(np.array([[0.0, LIMIT, -LIMIT], [99.0, -np.inf, 0.5 * LIMIT]])))
    assert pixels.shape == (2, 3, 4)
    alpha = pixels[..., 3]
    assert alpha.tolist() == [[0, 255, 255], [255, 255, pytest.approx(127, abs=2)]]
    more, less = pixels[0, 1], pixels[0, 2]
    assert more[0] > more[2] and less[2] > less[0]  # orange against blue
    assert np.array_equal(pixels[1, 0], more) and np.array_equal(pixels[1, 1], less)


def test_loads_are_placed_by_step_averaged_and_held():
    steps = np.array([0.0, 10, 20, 30, 400])
    shares = np.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]] * 2 + [[1.0, 0.0, 0.0, 0.0]])
    loads = load_over_time(steps, shares, columns=4)
    assert loads.shape == (4, 4)
    # Steps 0..30 are the first quarter: their mean; nothing new until the last quarter: the record at 30 holds.
    assert loads[:, 0] == pytest.approx(np.log2(np.array([0.375, 0.375, 0.125, 0.125]) * 4))
    assert loads[:, 1] == pytest.approx([0, 0, 0, 0]) and loads[:, 2] == pytest.approx([0, 0, 0, 0])
    assert loads[0, 3] == pytest.approx(2.0) and np.isneginf(loads[1:, 3]).all()


def test_one_record_makes_one_column():
    loads = load_over_time(np.array([1.0]), np.array([[0.25, 0.75]]))
    assert loads.tolist() == [[-1.0], [pytest.approx(math.log2(1.5))]]
