"""kill -9 at random moments, also in the middle of a save: what is left resumes, and ends bit for bit the same."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quintic.engine.run import Run
from quintic.engine.verification import differences

CHILD = """
import importlib.util, io, sys, time
from pathlib import Path
from rich.console import Console
from quintic.engine import loop, saving
from quintic.engine.run import Run

spec = importlib.util.spec_from_file_location("toy", {toy!r})
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
folder, pause = Path(sys.argv[1]), float(sys.argv[2])

class Slow(toy.ToyTask):
    def after_step(self, model, progress):
        if not self.steps:
            print("ready", flush=True)
        time.sleep(pause)
        return super().after_step(model, progress)

plain = saving.sha256_file
def slowly(path):
    time.sleep(pause)  # three files a save: a third of the time is spent inside saves
    return plain(path)
saving.sha256_file = slowly

overrides = ["engine.steps=400", "engine.checkpoint_every=3", "engine.eval_every=40", "engine.ema_decay=0.9"]
overrides.append(f"engine.background_save={{sys.argv[3]}}")
settings, run = toy.toy_run(folder, *overrides) if not folder.exists() else (None, Run.open(folder))
if settings is None:
    from quintic.engine import Settings
    settings = Settings.from_toml(run.settings_text(), toy.TYPES)
loop.train(Slow(), settings, run, Console(file=io.StringIO()), quiet_peak=True)
print("done", flush=True)
"""


def start(folder, pause, background):
    code = CHILD.format(toy=str(Path(__file__).with_name("toy.py")))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(pause), background],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("kills", "background"),
    [(3, "false"), (3, "true"), pytest.param(20, "false", marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kills, background):
    whole = start(tmp_path / "whole", 0.0, background)
    killed = in_saves = 0
    moment = random.Random(kills)
    for _ in range(4 * kills):
        if killed == kills:
            break
        child = start(tmp_path / "killed", 0.02, background)
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        time.sleep(moment.uniform(0.05, 0.9))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        in_saves += bool(list((tmp_path / "killed" / "checkpoints").glob("*.tmp")))
        child.communicate()
    assert killed == kills
    if kills == 20:
        assert in_saves >= 2, "no kill hit a save: the test has become too gentle"
    last = start(tmp_path / "killed", 0.0, background)
    out, errors = last.communicate(timeout=100)
    assert out == "ready\ndone\n", errors
    assert whole.communicate(timeout=100)[0] == "ready\ndone\n"
    tensors, wrong = differences(Run.open(tmp_path / "whole"), Run.open(tmp_path / "killed"))
    assert tensors >= 8 and wrong == []
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
