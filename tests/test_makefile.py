"""What ``make demo`` does, with stand-ins for Python and quintic that only write down how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    # The stand-in for Python makes a .venv of stand-ins when asked for one.
    script(
        tmp_path / "python",
        'echo "python $*" >> calls; [ "$2" != venv ] || { mkdir -p .venv/bin; cp bin/* .venv/bin; }',
    )
    script(tmp_path / "bin" / "python", 'echo "venv $*" >> calls')
    script(tmp_path / "bin" / "quintic", 'echo "quintic $*" >> calls; mkdir -p runs/demo')
    return tmp_path


def script(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def make(project, *arguments):
    """Run make and return the calls it made, version check left out."""
    (project / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["make", *arguments, "PYTHON=./python"], cwd=project, capture_output=True, text=True, timeout=60,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    calls = (project / "calls").read_text(encoding="utf-8").splitlines() if (project / "calls").exists() else []
    return done, [call for call in calls if not call.startswith("python -c")]


def test_demo_installs_once_and_never_overwrites_a_run(project):
    done, calls = make(project, "demo")
    assert done.returncode == 0, done.stderr
    made, torch, package, train = calls
    assert made == "python -m venv .venv"
    assert "--constraint constraints.txt" in torch and torch.endswith(" torch")
    assert "--constraint constraints.txt" in package and package.endswith(" .")
    assert train == "quintic train --size laptop --out runs/demo"
    assert make(project, "demo")[1] == ["quintic train --size laptop --out runs/demo-2"]


def test_changed_requirements_are_installed_again(project):
    make(project, "demo")
    later = (project / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(project / "pyproject.toml", (later, later))
    _, calls = make(project, "demo")
    assert len(calls) == 2 and "pip install" in calls[0] and calls[1].startswith("quintic train")


def test_test_leaves_out_slow_tests_and_brings_the_tools(project):
    _, calls = make(project, "test")
    assert calls[-2].endswith("--editable .[dev]")
    assert calls[-1] == "venv -m pytest -n auto --dist loadfile -m not slow"


def test_an_old_python_and_a_broken_venv_stop_before_anything_is_installed(project):
    script(project / "python", 'echo "python $*" >> calls; echo "too old" >&2; exit 1')
    done, calls = make(project, "demo")
    assert done.returncode != 0 and "too old" in done.stderr and calls == []
    # A venv without pip fails after its python was put in place: the next make must not take it for whole.
    script(project / "python", '[ "$2" != venv ] || { mkdir -p .venv/bin; cp bin/* .venv/bin; exit 1; }')
    assert make(project, "demo")[0].returncode != 0
    done, calls = make(project, "demo")
    assert done.returncode != 0 and calls == []
