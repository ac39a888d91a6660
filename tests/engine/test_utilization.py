"""The displayed share of the machine: never above the whole of it."""

import json

import pytest
import torch

from quintic.core import machine
from quintic.engine.utilization import Peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path))


def test_a_peak_taken_in_a_slow_moment_is_measured_again():
    machine.matmul_peak(CPU, torch.float32)
    (entry,) = (machine.cache_dir("machine")).glob("matmul-*.json")
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"flops_per_second": 1e6}))
    peak = Peak(CPU, torch.float32)
    assert peak.reached_by(5e5, 1.0) == 0.5
    assert peak.reached_by(1e7, 1.0) < 0.1  # ten times the old figure, little of the new one
    assert machine.matmul_peak(CPU, torch.float32) == peak.flops_per_second > 1e8  # and the next run starts with it


def test_a_step_quicker_than_the_best_measurement_is_the_peak():
    peak = Peak(CPU, torch.float32)
    assert peak.reached_by(1e18, 1.0) == 1.0
    assert peak.reached_by(5e17, 1.0) == 0.5
