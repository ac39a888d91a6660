"""Steps of the training loop on several ranks: initial weights, replayed float32, and their traffic by the plan."""

import pytest
from tests.distributed.processes import all_agree


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (4, 2), (4, 4)])
def test_real_steps(ranks, shards):
    all_agree(ranks, "real_steps.py", shards)
