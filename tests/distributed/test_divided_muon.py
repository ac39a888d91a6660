"""Muon, AdamW, clipping and the cap on parameters divided among processes, against whole ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (2, 1), (4, 2)])
def test_divided_and_whole_agree(ranks, shards):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("divided_muon.py")), str(shards)],
        capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]
