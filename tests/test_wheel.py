"""The wheel: whole, without strays, installable and usable without network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".c", ".h", ".typed", ".toml", ".txt", ".md", ".json", ".safetensors", ".png"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True, timeout=250,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = [name for name in names if name.startswith("quintic/")]
    others = [name for name in names if not name.startswith("quintic/")]
    source = ROOT / "src" / "quintic"
    files = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    here = {f"quintic/{path.relative_to(source).as_posix()}" for path in files}
    assert set(package) == here
    assert {Path(name).suffix for name in package} <= SUFFIXES
    for needed in (
        "py.typed",
        "assets/corpus/moby_dick.txt",
        "assets/corpus/README.md",
        "assets/presets/lm/laptop.toml",
        "assets/weights/ddpm/fashion28.safetensors",
        "assets/weights/ddpm/fashion28.md",
        "assets/weights/tarflow/fashion28.safetensors",
    ):
        assert f"quintic/{needed}" in package
    assert all(".dist-info/" in name for name in others)
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in others}


def test_installs_and_works_without_network(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=250)
    program = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import quintic, quintic.assets as a;"
        "assert quintic.__file__.startswith(sys.argv[1]), quintic.__file__;"
        "print(hashlib.sha256(a.corpus_path().read_bytes()).hexdigest(), a.preset_names('lm'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    digest = "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"
    assert run.stdout.startswith(digest) and "'laptop'" in run.stdout
