"""Statistics of recorded norms against numpy, and the advice for each way a run can go."""

import math
import re

import numpy as np
import pytest

from quintic.core import ConfigError
from quintic.optim.clip_advice import advice, clip_statistics


def test_statistics():
    norms = np.exp(np.random.default_rng(0).normal(size=1000))
    found = clip_statistics(norms.tolist(), 2.0)
    assert (found.p50, found.p90, found.p99) == pytest.approx(tuple(np.quantile(norms, [0.5, 0.9, 0.99])))
    assert found.largest == norms.max()
    assert found.clipped == (norms > 2.0).sum()
    assert found.early == (norms[:100] > 2.0).sum()
    assert found.clip_fraction == pytest.approx((norms > 2.0).mean())
    assert found.threshold == 2.0


def test_one_threshold_per_step():
    found = clip_statistics([1.0, 1.0, 3.0], [0.5, 2.0, 2.5])
    assert found.clipped == 2
    assert found.threshold == 2.5
    with pytest.raises(ConfigError, match="2 thresholds for 3 norms"):
        clip_statistics([1.0, 1.0, 3.0], [0.5, 2.0])


def test_nothing_recorded():
    found = clip_statistics([], 1.0)
    assert found.clip_fraction == 0.0
    assert math.isnan(found.p50)
    assert advice(found) == "no gradient norms were recorded"
    assert advice(clip_statistics([], [])) == "no gradient norms were recorded"


def norms_clipped(share, steps=1000, where="everywhere"):
    """Norms of 0.5, and of 4 at a share of the steps."""
    count = round(share * steps)
    norms = np.full(steps, 0.5)
    if count:
        norms[:count] = 4.0
        if where == "everywhere":
            norms = norms[np.random.default_rng(0).permutation(steps)]
    return norms.tolist()


@pytest.mark.parametrize(
    ("norms", "threshold", "expected"),
    [
        (norms_clipped(0.0), 1.0, "nothing was clipped: the largest norm was 0.5, the threshold is 1"),
        (norms_clipped(0.005), 1.0, r"^0\.50% of the steps were clipped: a guard against outliers"),
        (norms_clipped(0.03), 1.0, "^3% of the steps were clipped: a guard against outliers"),
        (norms_clipped(0.4), 1.0, r"^40% of the steps were clipped, more than outliers alone: the median norm is 0\.5"),
        (norms_clipped(0.8), 1.0, "^80% of the steps were clipped: the threshold 1 is below the median norm 4"),
        (norms_clipped(0.08, where="start"), 1.0, "^8% of the steps were clipped, nearly all within the first tenth"),
        (norms_clipped(0.08), math.inf, r"not clipped; a threshold near 4 \(P99"),
        ([*norms_clipped(0.1), math.nan, math.inf], 1.0, "not finite at 2 of 1002 steps"),
        ([3.0, 0.5, 0.5], 1.0, "^33% of the steps were clipped, more than outliers alone"),
    ],
)
def test_advice(norms, threshold, expected):

    line = advice(clip_statistics(norms, threshold))
    assert re.search(expected, line), line
    assert "\n" not in line
