"""Muon, AdamW, clipping and the cap on parameters divided among processes, against whole ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quintic.core import ConfigError
from quintic.optim import Muon


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_divided_and_whole_agree(ranks, shards):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "localhost:0", str(Path(__file__).with_name("divided_muon.py")), str(shards)],
        capture_output=True, text=True, timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="unknown distributed 'owners'; did you mean 'owner'"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], distributed="owners")
