"""A run that another machine goes on with: it computes in the dtype it began in, and its user is told."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from quintic.core import machine
from quintic.engine import hardware, loop
from quintic.engine.run import Run
from quintic.engine.verification import differences

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
assert _spec is not None and _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def go(settings, run, console=None, **options):
    loop.train(toy.ToyTask(), settings, run, console or Console(quiet=True), quiet_peak=True, **options)


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_what_auto_was_stays(tmp_path, monkeypatch, first, then):
    """A run that another kind of machine goes on with computes as it did."""
    runs = []
    for name, cut in (("whole", None), ("parted", 7)):
        settings, run = toy.toy_run(tmp_path / name, "engine.dtype=auto")
        monkeypatch.setattr(machine, "fast_dtype", lambda _: first)
        go(settings, run, stop_at=cut)
        runs.append(run)
    monkeypatch.setattr(machine, "fast_dtype", lambda _: then)
    go(settings, Run.open(run.folder))
    assert run.machine()["dtype"] == str(first).removeprefix("torch.")
    assert differences(*runs)[1] == []


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("compiled", "torch (there is no C compiler)", True),
        ("torch (there is no C compiler)", "compiled", True),
        ("torch (there is no C compiler)", "torch (QUINTIC_KERNELS=torch)", False),
        ("compiled", "compiled", False),
        (None, "compiled", True),
        (None, "torch (there is no C compiler)", False),
    ],
)
def test_other_kernels_are_told(before, now, told):
    """A record that says nothing of them is of a time when torch's operators computed everything."""
    earlier = {"torch": "2.13"} | ({"kernels": before} if before else {})
    words = hardware.changes(earlier, {"torch": "2.13", "kernels": now}, torch.device("cpu"))
    assert bool(words) == told
    assert all("kernels was" in line and "to rounding" in line for line in words)


def test_another_machine_is_told(tmp_path, monkeypatch):
    settings, run = toy.toy_run(tmp_path / "run", "engine.dtype=bfloat16")
    go(settings, run, stop_at=5)
    monkeypatch.setattr(hardware, "fast_dtype", lambda _: torch.bfloat16)
    for expected in (False, True):
        told = io.StringIO()
        go(settings, run, Console(file=told, width=200), stop_at=6)
        assert ("torch was 2.0 and is" in told.getvalue()) == ("to rounding" in told.getvalue()) == expected
        assert ("which is slow here" in told.getvalue()) == expected
        run.record_machine({**run.machine(), "torch": "2.0"})
        monkeypatch.setattr(hardware, "fast_dtype", lambda _: torch.float32)
