"""Several processes of one program, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def on_ranks(ranks, *words):
    """``python WORDS`` in so many processes, each with one thread; what it printed and its exit code."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0"] if ranks > 1 else []  # fmt: skip
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )


def all_agree(ranks, script, *words):
    """Whether a script of this folder finds that all processes agree; if not the test fails with what it said."""
    done = on_ranks(ranks, HERE / script, *words)
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr[-3000:]
