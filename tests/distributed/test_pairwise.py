"""All-gather and reduce-scatter by direct messages, against what each rank is known to have."""

import pytest
from tests.distributed.processes import all_agree


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (3, 3), (4, 2)])
def test_every_rank_gets_its_parts(ranks, shards):
    all_agree(ranks, "pairwise_messages.py", shards)
