"""The head of RESULTS.md follows the results and has what did not hold; and the whole page is what is written."""

import json
import re
import statistics
from pathlib import Path

import pytest
from benchmarks.__main__ import BENCHMARKS, RESULTS, written
from benchmarks.claims import Claim, slug
from benchmarks.headlines import contents, headlines, summary_section

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def results() -> dict:
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in BENCHMARKS
        if (path := RESULTS / f"{name}.json").exists()
    }


def test_the_page_is_what_would_be_written_now(page):
    assert written()[0] == page, "a text or a result has changed: run python -m benchmarks --collect"


def test_every_claim_that_does_not_hold_stands_in_the_head():
    claims = [
        Claim("A is better", "ours", "2 times", 0, "yes: better", "a"),
        Claim("B is better", "post 1", "0.5 times", 3, "no: worse", "b"),
        Claim("C is better", "post 2", "0.1 ± 0.2", 3, "undecided: within the noise", "c"),
    ]
    head = summary_section({}, claims)
    assert "checked 3 claims" in head and "1 hold here, 1 do not, and\n1 are within" in head
    assert "| B is better | 0.5 times | `b` |" in head and "* C is better: 0.1 ± 0.2 (`c`)" in head
    assert "A is better" not in head


def test_headlines_follow_the_results():
    found = results()
    before = headlines(found)
    assert len(before) > 10 and len(headlines({"demo": found["demo"]})) == 1
    found["experts_or_dense"]["arms"]["dense, equal time"]["losses"][0] += 1.0
    found["codec"]["models"]["emoji32"]["files"]["webp"][0] += 100.0
    found["beside_transformers"]["step_ms"]["quintic"] *= 2
    changed = [new[2] for old, new in zip(before, headlines(found), strict=True) if old != new]
    assert sorted(changed) == ["beside_transformers", "codec", "experts_or_dense"]


def test_anchors_of_the_page_have_headings(page):
    anchors = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(anchors) > 20 and anchors <= {slug(title) for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}
    assert contents(["## One, two\n\nwords"]) == "Sections: [One, two](#one-two)"


def test_numbers_in_the_words_of_pages_are_those_of_the_results():
    """Pages speak of the committed results: who commits others, perhaps of another machine, rewrites them."""

    def words(name: str) -> str:
        return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())

    def rounded(pattern: str, name: str, *numbers: float) -> None:
        match = re.search(pattern, words(name))
        assert match, (name, pattern)
        for said, number in zip(match.groups(), numbers, strict=True):
            digits = len(said.partition(".")[2])
            assert said == f"{number:.{digits}f}", f"docs/{name} says {said}, the results {number}: rewrite it"

    found = results()
    race = list(found["muon_race"]["sizes"].values())
    steps = [statistics.fmean(r["step_ratios"]) for r in race]
    times = [s * r["step_seconds"]["muon"] / r["step_seconds"]["adamw"] for s, r in zip(steps, race, strict=True)]
    rounded(
        r"needed (\S+) and (\S+) of AdamW's steps and (\S+) and (\S+) of its time", "alternatives.md", *steps, *times
    )
    best = [r["muon"]["best_lr"] / next(a for a in r["adamw"] if a["name"] == r["best_adamw"])["best_lr"] for r in race]
    assert sorted(best) == [1.0, 4.0] and "AdamW's own at one size, four times it at another" in words(
        "howto/use-muon.md"
    )
    seconds = {name: r["seconds"] for name, r in found["lowrank"]["times"].items()}
    rounded(r"it took (\S+) s where `quality` took (\S+) s and `fast` (\S+) s", "alternatives.md",
            *(seconds[f"{name}, float64"] for name in ("scipy", "quality", "fast")))  # fmt: skip
    excess = 100 * statistics.fmean(run["max_vio"] for run in found["demo"]["runs"])
    rounded(r"about (\d+) % more than its share", "posts/loss_free.md", excess)
    times = [run["max_vio"] / run["max_vio_floor"] for run in found["demo"]["runs"]]
    assert all(2 <= t <= 3 for t in times), f"docs/posts/loss_free.md says two to three times the floor, it is {times}"
    width256 = found["muon_speed"]["steps"]["12 x (256, 256)"]
    order = sorted(("quintic, bfloat16", "torch", "quintic"), key=lambda name: width256[name])
    assert order == ["quintic, bfloat16", "torch", "quintic"], f"docs/posts/muon.md has another order than {order}"
    slower = [n for n, t in found["muon_speed"]["steps"].items() if t["pytorch_optimizer"] >= t["quintic"]]
    assert not slower, f"docs/posts/muon.md says that pytorch_optimizer is quicker everywhere, but not on {slower}"
