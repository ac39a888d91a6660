"""The pages of a race and of a codec evaluation say what their records say."""

import json
import math
import re

import pytest
from PIL import Image
from tests.cli.command import quintic

from quintic.codec.comparison import Rate
from quintic.core import CheckpointError
from quintic.report.race import write_race_report
from quintic.report.rates import Example, write_rates_report


def arm(name, sweep, losses, **more):
    best = min(sweep, key=sweep.get)
    return {
        "name": name, "overrides": [f"optim.name={name}"], "sweep": sweep, "best_lr": float(best), "interior": True,
        "losses": losses, "seconds_per_step": 0.5, "mean": sum(losses) / len(losses), "spread": 0.25,
    } | more  # fmt: skip


def race_folder(folder, arms, matches=()):
    race = {
        "task": "lm",
        "steps": 6,
        "arms": arms,
        "winner": min(arms, key=lambda a: a["mean"])["name"],
        "matches": list(matches),
    }
    folder.mkdir()
    (folder / "race.json").write_text(json.dumps(race), encoding="utf-8")
    for each in arms:
        run = folder / f"{each['name']}-lr{each['best_lr']:g}-seed0-steps6"
        run.mkdir()
        end = each["mean"]
        rows = [
            {"step": s, "loss": 9.0} | ({"val_loss": end + 6 - s if math.isfinite(end) else None} if s % 3 == 0 else {})
            for s in range(7)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[1:]), encoding="utf-8")
        (run / "machine.json").write_text('{"cpu": "Abacus 9000"}', encoding="utf-8")
    return folder


def words(page):
    return " ".join(re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", page, flags=re.S).split())


@pytest.mark.parametrize("content", ["{}", '{"arms": []}', '{"arms": [3], "matches": []}', "[" * 200_000])
def test_a_damaged_record_of_a_race_is_named(tmp_path, content):
    folder = race_folder(tmp_path / "race", [arm("muon", {"0.1": 5.0}, [5.0])])
    (folder / "race.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"race\.json is damaged .*repeat the race with --out"):
        write_race_report(folder)
    assert not (folder / "race.html").exists()


def test_a_race_is_told_in_words_numbers_and_lines(tmp_path):
    slow = arm("sgd<b>", {"0.1": 5.0, "0.2": math.inf}, [5.0, 5.5], interior=False)
    fast = arm("muon", {"0.01": 4.25, "0.02": 4.0, "0.04": 4.5}, [4.0, 4.5])
    match = {"winner": "muon", "against": "sgd<b>", "step_ratio": 0.5, "time_ratio": 0.625}
    page = write_race_report(race_folder(tmp_path / "race", [slow, fast], [match])).read_text(encoding="utf-8")
    text = words(page)
    for expected in (
        "muon has the lowest loss",
        "muon reaches the loss of sgd&lt;b&gt; in 0.50 of its steps and 0.62 of its time",
        "validation loss of muon 4.2500 deviation 0.2500 over 2 seeds",
        "0.1 edge of the grid 500.0",
        "0.01 0.02 0.04 0.1 0.2 muon 4.2500 4.0000 4.5000 sgd&lt;b&gt; 5.0000 diverged",
        "Abacus 9000",
        "Validation loss nats per token",
    ):
        assert expected in text, expected
    assert "<b>" not in text and text.index("loss of muon 4.2500") < text.index(
        "loss of sgd&lt;b&gt; 5.2500"
    )  # the winner first
    assert 'aria-label="Validation loss over 6 steps: sgd&lt;b&gt; ends at 5.2500, muon ends at 4.2500"' in page
    assert [c.split()[-1] for c in re.findall(r'<path class="(line[^"]*)"', page)] == ["line", "hue1"]


def test_the_verb_makes_the_page_of_a_race_again(tmp_path, capsys):
    folder = race_folder(tmp_path / "race", [arm("a", {"0.1": 3.0}, [3.0])])
    assert quintic("report", folder) == 0 and str(folder / "race.html") in capsys.readouterr().out
    assert "a has the lowest loss" in words((folder / "race.html").read_text(encoding="utf-8"))


def test_one_seed_has_no_deviation_and_no_match_no_boast(tmp_path):
    text = words(write_race_report(race_folder(tmp_path / "r", [arm("a", {"0.1": 3.0}, [3.0])])).read_text())
    assert text.count("one seed") == 2 and "reaches" not in text and "0.2500" not in text


def test_an_arm_without_a_finite_loss_is_said_to_have_diverged(tmp_path):
    wild = arm("wild", {"0.1": math.inf}, [math.inf, 5.0], spread=math.nan, seconds_per_step=math.nan)
    good = arm("good", {"0.1": 4.0}, [4.0, 4.5])
    text = words(write_race_report(race_folder(tmp_path / "race", [wild, good])).read_text(encoding="utf-8"))
    assert "validation loss of wild diverged 1 of 2 seeds without a finite loss" in text
    assert "good has the lowest loss" in text and " inf" not in text and "nan" not in text
    text = words(write_race_report(race_folder(tmp_path / "both", [wild])).read_text(encoding="utf-8"))
    assert "Every arm diverged" in text


def test_a_race_that_is_not_finished_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="no finished race"):
        write_race_report(tmp_path)
    (tmp_path / "race.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"race\.json is damaged .*repeat the race"):
        write_race_report(tmp_path)


ROWS = [
    Rate("quintic", "40 bytes", 40, 20.0, 3), Rate("quintic", "80 bytes", 80, 30.0, 3),
    Rate("quintic", "120 bytes", 120, 35.0, 3),
    Rate("jpeg", "quality 0", 200, 25.0, 3), Rate("jpeg", "quality 10", 300, 35.0, 3),
    Rate("webp", "quality 0", 90, 31.0, 3), Rate("avif", "quality 0", 90, 21.0, 3),
]  # fmt: skip


def test_rates_compare_at_equal_quality(tmp_path):
    pixel = Image.new("L", (4, 4), 77)
    path = write_rates_report(tmp_path / "new" / "e", ROWS, [Example(pixel, [(40, 20.0, pixel), (120, 35.25, pixel)])])
    page = path.read_text(encoding="utf-8")
    text = words(page)
    assert "Files of 80 bytes reach 30.0 dB" in text
    assert "jpeg needs 250 bytes" in text  # half way between its two settings
    assert "webp needs its smallest file, 90 bytes" in text
    assert "avif needs a higher setting than was tried" in text
    assert "3 pictures" in text and "at 120 bytes 35.0 dB" in text
    assert len(re.findall('<path class="(?:line|dots)', page)) == 4
    assert re.findall('<img alt="([^"]*)" src="data:image/png', page) == [
        "Picture 1, the original",
        "Picture 1 from a file of 40 bytes, 20 dB",
        "Picture 1 from a file of 120 bytes, 35.2 dB",
    ]
    assert [row["bytes"] for row in json.loads((path.parent / "rates.json").read_text())] == [r.bytes for r in ROWS]
    assert "| webp | quality 0 | 90.0 | 31.00 dB |" in (path.parent / "rates.md").read_text()


def test_one_size_of_one_codec_is_enough(tmp_path):
    text = words(write_rates_report(tmp_path, ROWS[:1], []).read_text(encoding="utf-8"))
    assert "Files of 40 bytes reach 20.0 dB . Drawn" not in text and "What comes back" not in text
    assert "For that quality" not in text
