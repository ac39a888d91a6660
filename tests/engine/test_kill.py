"""kill -9 at random moments, also in the middle of a save: what is left resumes, and ends bit for bit the same."""

import multiprocessing
import random
import signal
import sys
import time

import pytest
from tests.engine import killed

from quintic.engine.run import Run
from quintic.engine.verification import differences

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there")


@pytest.fixture(scope="module")
def start():
    """Starts a training in a process of its own, forked from one that has imported all it needs: that takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed.__name__, "torch._dynamo"])

    def start(folder, steps, pause, background):
        hears, tells = context.Pipe(duplex=False)
        process = context.Process(target=killed.train, args=(folder, steps, pause, background, tells))
        process.start()
        tells.close()
        return process, hears

    return start


@pytest.mark.parametrize(
    ("kills", "background"),
    [(3, False), (3, True), pytest.param(20, False, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, start, kills, background):
    steps = 100 + 50 * kills  # a step takes 0.02 s at least, so that what is killed is never at its end
    whole, of_whole = start(tmp_path / "whole", steps, 0.0, background)
    dead = in_saves = 0
    moment = random.Random(kills)
    for _ in range(4 * kills):
        if dead == kills:
            break
        child, of_child = start(tmp_path / "killed", steps, 0.02, background)
        assert of_child.recv() == "ready"
        time.sleep(moment.uniform(0.05, 0.9))
        child.kill()
        child.join()
        dead += child.exitcode == -signal.SIGKILL
        in_saves += bool(list((tmp_path / "killed" / "checkpoints").glob("*.tmp")))
    assert dead == kills
    if kills == 20:
        assert in_saves >= 2, "no kill hit a save: the test has become too gentle"
    _, of_last = start(tmp_path / "killed", steps, 0.0, background)
    for hears in (of_last, of_whole):
        assert (hears.recv(), hears.recv()) == ("ready", "done")
    whole.join()
    tensors, wrong = differences(Run.open(tmp_path / "whole"), Run.open(tmp_path / "killed"))
    assert tensors >= 8 and wrong == []
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
