"""Two processes that share a batch end with the bias and the auxiliary gradient of one that has all of it."""

from tests.distributed.processes import all_agree


def test_two_processes_are_one_batch():
    all_agree(2, "shared_balance.py")
