"""The table of methods names files that are there; commands, examples and links are run by test_pages.py."""

import re
from pathlib import Path

from docs.figures.results import filled

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_of_the_methods_are_there():
    targets = re.findall(r"\| `([a-z]+/[a-z_./]*)` \|", README)
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / "src" / "quintic" / target).exists(), target


def test_the_table_of_results_is_that_of_results_md():
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert "<!-- results: " in README and filled(README, results) == README, "run python -m benchmarks --collect"
