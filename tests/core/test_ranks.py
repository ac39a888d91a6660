"""Who goes first among several processes; that they really talk is tested in tests/distributed."""

import pytest

from quintic.core import CheckpointError, DataError
from quintic.core.ranks import ALONE, Ranks


@pytest.mark.parametrize("failure", [None, DataError("no such file: x.txt")])
def test_what_stops_the_main_rank_stops_the_others_in_its_words(failure):
    order, said = [], []

    class Noted(Ranks):
        def gather(self, mine):
            said.append(mine)
            return said[:1]  # what the main one said

    for rank in range(3):
        wanted = DataError if rank == 0 else CheckpointError
        with pytest.raises(wanted, match="no such file") if failure else ALONE.main_first():  # noqa: SIM117
            with Noted(rank, 3).main_first():
                order.append(rank)
                if failure:
                    raise failure
    assert order == ([0] if failure else [0, 1, 2])
