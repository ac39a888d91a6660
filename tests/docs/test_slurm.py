"""The script for Slurm, with stand-ins for Slurm's commands: how the job ends, and when it goes back into the queue."""

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "scale-out.md"
SRUN = """#!/bin/sh
echo "srun $*" >> "$TOLD"
[ -z "$ENDS" ] || echo "{\\n \\"status\\": \\"$ENDS\\"\\n}" > "$RUN/run.json"
exit $CODE
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "scontrol $*" >> "$TOLD"; fi
"""


@pytest.mark.skipif(os.name == "nt", reason="no shell")
@pytest.mark.parametrize(
    ("ends", "code", "again"),
    [("finished", 0, False), ("failed", 1, False), ("stopped", 1, True), ("stopped", 0, True), ("", 2, False)],
)
def test_a_job_ends_as_its_run_does_and_only_a_stopped_one_is_queued_again(tmp_path, ends, code, again):
    script = next(
        block for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.S) if "#SBATCH" in block
    )
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("job", script)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    told = tmp_path / "told"
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32"}
    facts = {"RUN": str(tmp_path / "run"), "TEXT": "text", "TOLD": str(told), "ENDS": ends, "CODE": str(code)}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tmp_path / "job"], env={"PATH": path, **slurm, **facts}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, "")
    first, *rest = told.read_text().splitlines()
    assert first.startswith("srun --cpus-per-task=32 torchrun --nnodes 2") and "first:29500" in first
    assert first.endswith(f"-m quintic resume {tmp_path / 'run'}")
    assert rest == ["scontrol requeue 7"] * again
