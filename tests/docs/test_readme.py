"""The table of methods names files that are there, and the demo ends as measured; test_pages.py runs commands, examples
and links."""

import json
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


def test_the_end_of_the_demo_is_that_of_its_first_run():
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    run = demo["runs"][0]
    said = re.search(r"^step (\d+)/\1  validation loss [\d.]+, ([\d.]+) bits/byte$", README, re.M)
    assert said and said.groups() == (str(run["steps"]), f"{run['val_bits_per_byte']:.3f}") and run["seed"] == 0
    assert f"{demo['parameters_total'] / 1e6:.1f} million parameters from scratch" in README
