"""Layouts of other programs: tensor parallelism below FSDP, experts on a mesh of their own, against one process."""

from tests.distributed.processes import all_agree


def test_every_layout_takes_the_steps_of_one_process():
    all_agree(4, "several_meshes.py")
