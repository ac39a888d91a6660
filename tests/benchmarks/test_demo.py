"""The measures of the demo benchmark measure what they say."""

import importlib
import json
from pathlib import Path

from benchmarks.demo import longest_copied_run, section, share_of_known_words


def test_known_words():
    assert share_of_known_words("The whale blorp swam awa", "the Whale swam away") == 3 / 4
    assert share_of_known_words("don\u2019t stop it", "I don\u2019t stop") == 1.0


def test_longest_copy():
    assert longest_copied_run("xx the\nwhale swam yy", "so the whale  swam on") == len(" the whale swam ")
    assert longest_copied_run("abc", "xyz") == 0


def test_section_names_the_machine():
    numbers = ("steps", "tokens", "val_bits_per_byte", "test_bits_per_byte", "wall_seconds", "peak_memory_mb", "mfu",
               "optimizer_share", "max_vio", "max_vio_floor", "known_words", "longest_copied_run", "seed")  # fmt: skip
    machine = {"cpu": "A CPU", "threads": 2, "dtype": "float32", "matmul_gflops": 1.0, "torch": "2"}
    run = dict.fromkeys(numbers, 0)
    text = section({"machine": machine, "parameters_total": 5, "parameters_active": 4, "runs": [run]})
    assert "A CPU, 2 threads" in text and "| 0 | 0.000 |" in text


def test_sections_of_the_committed_results_are_those_of_the_results_page():
    root = Path(__file__).parent.parent.parent
    page = (root / "RESULTS.md").read_text(encoding="utf-8")
    found = sorted((root / "benchmarks" / "results").glob("*.json"))
    assert found
    for path in found:
        module = importlib.import_module(f"benchmarks.{path.stem}")
        assert module.section(json.loads(path.read_text(encoding="utf-8"))) in page
