"""The names at the top of the package."""

import importlib

import pytest

import quintic


def test_lazy_names_are_those_of_their_rooms():
    for name, room in quintic._HOMES.items():
        assert getattr(quintic, name) is getattr(importlib.import_module(f"quintic.{room}"), name)
    assert set(dir(quintic)) == set(quintic.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Mouon'"):
        _ = quintic.Mouon


@pytest.mark.parametrize(
    "room",
    ["core", "linalg", "optim", "moe", "lowrank", "data", "lm", "flow", "diffusion", "codec", "engine", "report"],
)
def test_everything_exported_exists(room):
    module = importlib.import_module(f"quintic.{room}")
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
