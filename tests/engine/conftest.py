"""What tests of the engine share."""

import pytest
from tests.engine import toy
from tests.engine.toy import go


@pytest.fixture
def whole(tmp_path):
    settings, run = toy.toy_run(tmp_path / "whole")
    outcome = go(toy.ToyTask(), settings, run)
    assert outcome.finished and outcome.step == 12 and outcome.sample == "sample"
    return run
