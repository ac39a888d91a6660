"""The page of several runs says what their records say, and compares what can be compared."""

import re

import numpy as np
import pytest
from tests.cli.command import quintic
from tests.report.made_run import CONFIG, make_run, row
from tests.report.test_page import Document


def rows(shift, *, every=10, steps=40, seconds=0.5, text=True):
    made = []
    for step in range(1, steps + 1):
        made.append(row(step, text=text) | {"seconds": seconds * step})
        if step % every == 0:
            made[-1] |= {"val_loss": 9 + shift - step / 10} | (
                {"val_bits_per_byte": 4 + shift - step / 20} if text else {}
            )
    return made


def run_of(folder, name, shift, *, config=CONFIG, data=None, status="finished", task="lm", **how):
    run = {
        "task": task,
        "status": status,
        "title": "Moby Dick",
        "parameters_total": 1_940_000,
        "data": data or {"b": 1},
    }
    return make_run(folder / name, rows(shift, **how), run=run, config=config, machine={"threads": 2})


def text_of(path):
    page = path.read_text(encoding="utf-8")
    return page, " ".join(Document(page).text.split())


@pytest.fixture
def two(tmp_path):
    other = CONFIG.replace("lr = 0.02", "lr = 0.5").replace("[engine]", '[engine]\nnew = "<b>"')
    return run_of(tmp_path, "a", 0.5), run_of(tmp_path, "b<i>", 0.0, config=other, seconds=0.25)


def test_two_runs_in_words_numbers_and_lines(two, tmp_path, capsys):
    assert quintic("report", *two) == 0
    assert f"report: {tmp_path / 'comparison.html'}" in capsys.readouterr().out
    page, text = text_of(tmp_path / "comparison.html")
    for expected in (
        "Comparison of 2 runs b<i> ends lowest Its validation bits per byte is 2.0000 , 0.5000 below a",
        "validation bits per byte of b<i> 2.0000 validation bits per byte of a 2.5000",
        "b<i> 2.0000 2.0000 at step 40 1.94 M 40 40.0 k 10.0 s 2,000",  # its sizes
        "a b<i> optim.lr 0.02 0.5 engine.new <b>",
    ):
        assert expected in text, expected
    assert "clip_norm" not in text and "threads" not in text and "same data" not in text
    assert "b<i>" not in page and "//" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_curves_are_the_validations_over_steps_and_over_seconds(two, tmp_path):
    assert quintic("report", *two) == 0
    page, _ = text_of(tmp_path / "comparison.html")
    frames = re.findall(r'data-name="(\w+)" data-x="(.*?)" data-y="(.*?)">(<svg.*?</svg>)', page, re.S)
    assert [frame[0] for frame in frames] == ["step", "seconds"]
    for (_, x_ends, y_ends, svg), per_step in zip(frames, ((1.0, 1.0), (0.5, 0.25)), strict=True):
        (x0, x1), (y0, y1) = (map(float, ends.split()) for ends in (x_ends, y_ends))
        for name, shift, pace in zip(("a", "b&lt;i&gt;"), (0.5, 0.0), per_step, strict=True):
            (path,) = re.findall(rf'data-name="{name}" d="(.*?)"', svg)
            drawn = np.array([list(map(int, point.split())) for point in re.split("[ML]", path)[1:]]) / 10000
            steps = np.array([10, 20, 30, 40])
            assert x0 + drawn[:, 0] * (x1 - x0) == pytest.approx(steps * pace, abs=0.01)
            assert y0 + (1 - drawn[:, 1]) * (y1 - y0) == pytest.approx(4 + shift - steps / 20, abs=0.01)


def test_a_run_that_is_not_finished_and_other_data_are_said(tmp_path):
    runs = run_of(tmp_path, "a", 0.0), run_of(tmp_path, "b", 1.0, status="stopped", data={"b": 2}, steps=20)
    assert quintic("report", *runs, "--out", tmp_path / "new" / "page.html") == 0
    _, text = text_of(tmp_path / "new" / "page.html")
    assert "Not all had the same data" in text and text.count("stopped at step 20") == 2


def test_no_difference_is_said_and_the_tokenizer_is_none_of_the_data(tmp_path):
    runs = [run_of(tmp_path, name, 0.0, data={"train": {"bytes": 5, "tokens": n}}) for n, name in enumerate("ab")]
    assert quintic("report", *runs) == 0
    _, text = text_of(tmp_path / "comparison.html")
    assert "No setting" in text and "same data" not in text


def test_losses_are_compared_where_there_are_no_bits_and_never_validated_runs_come_last(tmp_path):
    config = CONFIG.replace('"lm"', '"ddpm"')
    good = run_of(tmp_path, "z", 0.0, text=False, task="ddpm", config=config)
    bare = run_of(tmp_path, "a", 0.0, text=False, task="ddpm", config=config, every=99)
    assert quintic("report", bare, good) == 0
    _, text = text_of(tmp_path / "comparison.html")
    assert "z ends lowest Its validation loss is 5.0000 . One run" in text and "validation loss of a none" in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = run_of(tmp_path / "x", "a", 0.0), run_of(tmp_path / "y", "a", 1.0)
    assert quintic("report", *runs) == 0
    _, text = text_of(tmp_path / "x" / "comparison.html")
    assert all(f"bits per byte of {run}" in text for run in runs)


def test_fractions_of_a_second_are_an_axis_too(tmp_path):
    runs = [run_of(tmp_path, name, 0.0, every=40, seconds=pace) for name, pace in (("a", 0.0101), ("b", 0.012))]
    assert quintic("report", *runs) == 0


def test_mistakes_say_what_to_do(two, tmp_path, capsys):
    images = run_of(tmp_path, "c", 0.0, text=False, task="ddpm", config=CONFIG.replace('"lm"', '"ddpm"'))
    bare = [run_of(tmp_path, name, 0.0, every=99) for name in "de"]
    for command, said in (
        ([*two, two[0] / ".." / "a"], "named twice"),
        ([two[0], images], f"{two[0]} is of lm, {images} is of ddpm"),
        ([two[0], tmp_path], "holds no run"),
        (bare, "none of these runs was validated"),
        ([*two, "--out", tmp_path / "page.pdf"], "ends in .html"),
        ([two[0], "--out", tmp_path / "page.html"], "are for a comparison"),
    ):
        assert quintic("report", *command) == 2
        assert said in " ".join(capsys.readouterr().err.split()), said
    (tmp_path / "mine.html").write_text("precious")
    assert quintic("report", *two, "--out", tmp_path / "mine.html") == 2
    assert "mine.html exists; --overwrite replaces it" in capsys.readouterr().err
    for name in ("comparison.html", "comparison-2.html"):
        assert quintic("report", *two) == 0 and name in capsys.readouterr().out
