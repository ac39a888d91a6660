"""Steps of the training loop on several ranks: initial weights, replayed float32, and their traffic by the plan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (4, 2), (4, 4)])
def test_real_steps(ranks, shards):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("real_steps.py")), str(shards)],
        capture_output=True, text=True, timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]
