"""The benchmark runs at a small size, and what it writes holds what it measured."""

import json
import xml.etree.ElementTree as ET

from benchmarks import lowrank


def test_a_small_run():
    small = {"Hilbert 800, k = 10": (lowrank.hilbert(60), 5)}
    result = lowrank.run(small, trials=6, big=(120, 60, 10), sizes=(60, 90), haar_seeds=1)
    result = json.loads(json.dumps(result))
    text = lowrank.section(result)
    assert f"{result['quality']['Hilbert 800, k = 10']['quality']:.3g}" in text and "| scipy, float64 |" in text
    assert result["tolerance"]["above"] == result["tolerance"]["operators_above"] == 0
    assert 1 <= result["times"]["fast, float64"]["ratio"] < 2 and result["single"]["cross, quality"] < 1e-5
    for svg in lowrank.plots(result).values():
        ET.fromstring(svg)
