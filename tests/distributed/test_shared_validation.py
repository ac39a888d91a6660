"""Validation shared among processes, of a divided model, against one process and a whole model."""

from tests.distributed.processes import all_agree


def test_a_shared_validation_is_that_of_one_process():
    all_agree(2, "shared_validation.py")
