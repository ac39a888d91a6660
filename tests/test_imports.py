"""The import rule: floors, and what importing the package must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import quintic

ROOT = Path(quintic.__file__).parent
FLOORS = {
    "core": 1, "assets": 1, "linalg": 2, "optim": 3, "moe": 3, "lowrank": 3, "data": 3, "lm": 4, "flow": 4,
    "diffusion": 4, "codec": 5, "engine": 6, "report": 7, "cli": 8,
}  # fmt: skip
TRAINED = {"lm", "flow", "diffusion", "codec"}
ALLOWED_DOWN = {("assets", "core")}


def imported_rooms(source: str) -> set[str]:
    """Rooms of quintic that a source imports, at any depth of the file."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [node.module or ""]
            if node.module == "quintic":
                names = [f"quintic.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("quintic.")}
    return rooms & FLOORS.keys()


def violations(room: str, source: str) -> list[str]:
    wrong = []
    for other in imported_rooms(source) - {room}:
        below = FLOORS[other] < FLOORS[room] or (room, other) in ALLOWED_DOWN
        apart = (room == "engine" and other in TRAINED) or (room in TRAINED and other == "engine")
        if not below or apart:
            wrong.append(f"{room} imports {other}")
    return wrong


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_the_floors_below(path):
    room = path.relative_to(ROOT).parts[0]
    if room in ("__init__.py", "__main__.py", "runs.py"):  # above all floors
        return
    assert room in FLOORS, f"{path} is in a room that the plan does not know"
    assert violations(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "from quintic.linalg import msign"),
        ("optim", "import quintic.moe.layer"),
        ("engine", "from quintic.lm import LMConfig"),
        ("lm", "def f():\n    from quintic.engine.task import Task"),
        ("data", "from quintic import cli"),
    ],
)
def test_the_check_finds_violations(room, source):
    assert violations(room, source)


def test_the_check_allows_what_it_should():
    assert violations("lm", "import torch\nfrom quintic.moe import MoE\nfrom quintic.lm.rope import rotate") == []


def test_no_module_has_the_name_of_a_function_it_exports():
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "cli":  # one file per verb: the verb is the command
            continue
        names = {n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}
        assert path.stem not in names, path


@pytest.mark.parametrize(
    "code",
    [
        "import quintic",
        "import quintic.core",
        "import quintic.data",
        "from quintic.cli.app import main; main(['--help'])",
        "from quintic.cli.app import main; main(['train', '--help'])",
        "from quintic.cli.app import main; main(['matrix', '--help'])",
        "import quintic.codec",
        "from quintic.cli.app import main; main(['codec', 'info', '--help'])",
        "from quintic.cli.app import main; main(['--version'])",
    ],
)
def test_torch_is_not_imported(code):
    program = (
        f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["codec", "--help"], ["--version"]])
def test_help_imports_nothing_that_computes(arguments):
    program = (
        f"import sys\ntry:\n    from quintic.cli.app import main; main({arguments!r})\nexcept SystemExit as end:\n"
        "    assert not end.code\nassert not {'numpy', 'PIL', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
