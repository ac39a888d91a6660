"""Hardware facts: names resolve or fail clearly, the peak is cached and survives a damaged cache."""

import json

import pytest
import torch

from quintic.core import ConfigError, machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUINTIC_CACHE", str(tmp_path))


def test_device_names():
    assert machine.pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"did you mean 'cpu'"):
        machine.pick_device("cpuu")
    with pytest.raises(ConfigError, match="not understood"):
        machine.pick_device("cpu:x")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not available"):
            machine.pick_device("cuda:0")
        assert machine.pick_device() == CPU


@pytest.mark.parametrize("units", [True, False])
def test_dtype_on_cpus_is_float32_unless_asked_for(units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    assert machine.pick_dtype("auto", CPU) == torch.float32
    assert machine.pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert machine.pick_dtype("float64", CPU) == torch.float64
    with pytest.raises(ConfigError, match="float32"):
        machine.pick_dtype("float31", CPU)


@pytest.mark.parametrize(("generation", "expected"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_dtype_on_cuda_follows_capability(generation, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))
    assert machine.pick_dtype("auto", torch.device("cuda")) == expected


def test_a_machine_says_whether_it_has_matrix_units(monkeypatch):
    for there, words in ((True, ", AMX"), (False, ", no AMX")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda there=there: there)
        assert machine.describe(CPU, torch.float32)["instructions"].endswith(words)


def test_peak_is_measured_once_and_cached(tmp_path):
    first = machine.matmul_peak(CPU, torch.float32)
    assert first > 1e8
    (entry,) = (tmp_path / "machine").iterdir()
    facts = json.loads(entry.read_text())
    assert facts["torch"] == torch.__version__ and facts["dtype"] == "float32"
    facts["flops_per_second"] = 123.0
    entry.write_text(json.dumps(facts))
    assert machine.matmul_peak(CPU, torch.float32) == 123.0
    entry.write_text("{")
    assert machine.matmul_peak(CPU, torch.float32) > 1e8


def test_peak_memory_grows_with_use():
    before = machine.peak_memory_bytes(CPU)
    if before is None:
        pytest.skip("this system does not tell")
    block = torch.ones(200 << 20, dtype=torch.uint8)
    assert machine.peak_memory_bytes(CPU) >= max(before, block.numel())
