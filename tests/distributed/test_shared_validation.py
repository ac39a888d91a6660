"""Validation shared among processes, of a divided model, against one process and a whole model."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_shared_validation_is_that_of_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("shared_validation.py"))],
        capture_output=True, text=True, timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]
