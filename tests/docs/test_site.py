"""The site builds without a warning, needs nothing from elsewhere, and the reference is complete."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import quintic

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("linalg", "optim", "moe", "lm", "lowrank", "flow", "diffusion", "codec", "data", "engine", "core", "report")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(folder / "doctrees"), "-b", "html",
         str(ROOT / "docs"), str(folder / "html")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(site, package):
    page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
    names = import_module(f"quintic.{package}").__all__
    assert names and [name for name in names if f'id="quintic.{package}.{name}"' not in page] == []


def test_names_of_the_library_itself_are_listed(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in quintic.__all__ if f">{name}<" not in page and name != "__version__"] == []


def test_every_setting_and_every_verb_has_its_words(site):
    settings = (site / "api" / "settings.html").read_text(encoding="utf-8")
    for name in ("lm.num_experts", "optim.lr", "engine.shards", "tarflow.patch", "ddpm.width", "data.tokenizer"):
        assert name in settings
    assert settings.count("<table") >= 7 and "|---" not in settings  # tables came out as tables
    verbs = (site / "api" / "cli.html").read_text(encoding="utf-8")
    for verb in ("train", "resume", "codec-encode", "matrix-cur"):
        assert f'id="quintic-{verb}"' in verbs


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"(https?:[^\"]*)", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload)\"[^>]*href=\"(https?:[^\"]*)", text)
        assert not loaded, (page.name, loaded)


def test_formulas_are_mathml(site):
    text = (site / "howto" / "use-muon.html").read_text(encoding="utf-8")
    assert "<math" in text and "$" not in re.sub(r"<pre.*?</pre>|<script.*?</script>", "", text, flags=re.DOTALL)


def test_rules_of_selection_are_listed(site):
    from quintic.lowrank import RULES

    page = (site / "api" / "lowrank.html").read_text(encoding="utf-8")
    assert [rule for rule in RULES if f">{rule}<" not in page] == []
