"""The proof of an exact resume, and that it would find an inexact one."""

import importlib.util
from pathlib import Path

import pytest
import torch

from quintic.core import ConfigError
from quintic.engine.verification import verify_resume

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
assert _spec is not None and _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def test_an_exact_resume_is_proved(tmp_path):
    settings, _ = toy.toy_run(tmp_path / "run", "engine.ema_decay=0.9")
    result = verify_resume(toy.ToyTask(), settings, tmp_path)
    assert (result.steps, result.cut, result.differences) == (6, 3, [])
    # Two weights and a buffer, two averages, two momenta or moments, the random generator.
    assert result.tensors >= 8


@pytest.mark.parametrize(("steps", "found"), [(2, (2, 1)), (3, (3, 1)), (20, (4, 2))])
def test_the_cut_is_half_way_of_the_steps_that_there_are(tmp_path, steps, found):
    settings, _ = toy.toy_run(tmp_path / "run", "engine.steps=4")
    result = verify_resume(toy.ToyTask(), settings, tmp_path, steps=steps)
    assert (result.steps, result.cut, result.differences) == (*found, [])


def test_a_forgotten_state_is_found(tmp_path):
    """A task that keeps something the checkpoint does not hold: a resume starts it anew."""

    class Forgetful(toy.ToyTask):
        def build(self, *args, **options):
            self.drift = 0.0
            return super().build(*args, **options)

        def after_step(self, model, progress):
            self.drift += 0.01
            with torch.no_grad():
                model.head.add_(self.drift)
            return super().after_step(model, progress)

    settings, _ = toy.toy_run(tmp_path / "run")
    found = verify_resume(Forgetful(), settings, tmp_path).differences
    assert "model: head" in found and "metrics: step 5" in found and "metrics: step 3" not in found


def test_the_cut_lies_inside(tmp_path):
    settings, _ = toy.toy_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="between step 1 and 5 of 6"):
        verify_resume(toy.ToyTask(), settings, tmp_path, cut=6)
    for short in (1, 0, -3):
        with pytest.raises(ConfigError, match=f"at least 2 steps, found {short}"):
            verify_resume(toy.ToyTask(), settings, tmp_path, steps=short)
