"""The whole page: what is on it, what is not, and that it loads nothing and runs nothing of others."""

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tests.report.made_run import CONFIG, make_run, page_of, row

from quintic.report import write_report


def full_run(folder):
    return make_run(
        folder,
        [row(step) for step in range(1, 201)],
        run={
            "task": "lm",
            "size": "tiny",
            "status": "finished",
            "title": "Moby Dick",
            "parameters_total": 1_940_000,
            "parameters_active": 812_000,
            "data": {"train": {"bytes": 123456, "tokens": 40000}, "validation": {"bytes": 6543, "tokens": 2000}},
        },
        machine={"cpu": "Abacus 9000", "threads": 2, "device": "cpu", "torch": "2.13.0", "peak_memory_mb": 914},
        samples={"step-000100.txt": "first try", "step-000200.txt": "Call me Ishmael."},
    )


class Document(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_a_full_run_shows_everything_it_recorded(tmp_path):
    path = write_report(full_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "config.toml", "machine.json", "metrics.jsonl", "report.html", "run.json", "samples",
    ]  # fmt: skip
    text = Document(path.read_text(encoding="utf-8")).text
    final = row(200)
    for expected in (
        "Moby Dick",
        "Language model, size tiny",
        "finished",
        f"{final['val_bits_per_byte']:.3f}",
        "200 steps in 1 min 40 s on Abacus 9000",
        "tokens trained on 200 k",
        "5.0 passes over the data",
        "1.94 M",
        "812 k active for a token",
        "914 MiB",
        "123,456",
        "Bits per byte",
        "Loss",
        "Learning rate",
        "Gradient norm",
        "of the steps were clipped",
        "The optimizer takes 11% of a step",
        "31% of the machine's measured",
        "Balance of the experts",
        "Experts picked at random would reach 0.05",
        "Load of every expert",
        "without any token in the last step: 1",
        "Call me Ishmael.",
        "first try",
        "Abacus 9000",
        "lr = 0.02 # preset tiny",
    ):
        assert expected in text, expected


def test_the_best_validation_is_named_where_it_was_not_the_last(tmp_path):
    rows = [row(step) for step in range(1, 101)]
    rows[49]["val_bits_per_byte"], rows[99]["val_bits_per_byte"] = 1.5, 1.75
    text = Document(page_of(make_run(tmp_path / "run", rows))).text
    assert "1.750" in text and "best 1.500 at step 50" in text


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_that_stopped_early_says_so(tmp_path, status):
    facts = {"task": "lm", "status": status, "error": "step 61: loss <nan>" if status == "failed" else None}
    text = Document(page_of(make_run(tmp_path / "run", [row(s) for s in range(1, 61)], run=facts))).text
    assert f"{status} at step 60" in text and "of 200" in text
    assert ("It ended with an error: step 61: loss <nan>" in text) == (status == "failed")


def test_a_dense_image_run_has_only_the_sections_it_has_data_for(tmp_path):
    rows = [row(step, moe=False, text=False) for step in range(1, 101)]
    image = tmp_path / "grid.png"
    Image.new("L", (8, 8), 77).save(image)
    folder = make_run(tmp_path / "run", rows, run={"task": "ddpm"}, samples={"step-000100.png": image.read_bytes()})
    document = Document(page_of(folder))
    for absent in ("Experts", "per byte", "What it writes", "Made of", "token"):
        assert absent not in document.text, absent
    assert "Diffusion image model" in document.text and "What it draws" in document.text
    (shown,) = [attributes["src"] for tag, attributes in document.tags if tag == "img"]
    assert base64.b64decode(shown.removeprefix("data:image/png;base64,")) == image.read_bytes()


@pytest.mark.parametrize(
    ("task", "unit"), [("tarflow", "nats per pixel value"), ("ddpm", "mean squared error"), ("lm", "nats per token")]
)
def test_a_loss_without_bits_comes_first_and_has_a_unit(tmp_path, task, unit):
    rows = [row(step, moe=False, text=False) for step in range(1, 101)]
    page = page_of(make_run(tmp_path / "run", rows, run={"task": task}))
    assert page.index("How it learned") < page.index("<h3>Loss</h3>") < page.index("Optimization")
    assert f"{rows[-1]['val_loss']:.3f}</b> {unit}" in page and f'<span class="unit">{unit}</span>' in page


def test_the_bits_of_a_flow_are_told_before_its_loss(tmp_path):
    rows = [row(step, moe=False, text=False) | {"bits_per_dim": 5.0 + 1 / step} for step in range(1, 101)]
    rows[49]["val_bits_per_dim"], rows[99]["val_bits_per_dim"] = 5.5, 5.25
    page = page_of(make_run(tmp_path / "run", rows, run={"task": "tarflow"}))
    text = Document(page).text
    assert "On images it never saw it needs 5.250 bits per dimension ; raw pixels take 8." in text
    assert "validation bits per dimension 5.250 the best of the run" in text
    assert f"validation loss {rows[-1]['val_loss']:.3f} nats per pixel value" in text
    assert page.index("<h3>Bits per dimension</h3>") < page.index("Optimization") < page.index("<h3>Loss</h3>")


def test_an_odd_narrow_figure_is_made_wide(tmp_path):
    """Three narrow ones would leave a hole beside the last."""
    page = page_of(make_run(tmp_path / "run", [row(s, moe=False, text=False) for s in range(1, 60)]))
    assert re.findall(r'<figure class="(\w*)"><h3>(.*?)</h3>', page) == [
        ("wide", "Loss"), ("", "Learning rate"), ("", "Gradient norm"), ("wide", "Speed"),
    ]  # fmt: skip


def test_only_a_few_of_many_samples_are_shown_first_and_last_among_them(tmp_path):
    samples = {f"step-{i:06d}.txt": f"<sample {i}>" for i in range(1, 41)}
    samples["notes.md"] = "not a sample"
    text = Document(page_of(make_run(tmp_path / "run", [row(1)], samples=samples))).text
    shown = [int(n) for n in re.findall(r"<sample (\d+)>", text)]
    assert len(shown) == 6 and shown[0] == 40 and shown[-1] == 1
    assert "not a sample" not in text


def test_what_others_wrote_is_text_and_never_markup(tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)"></pre></details>'
    folder = make_run(
        tmp_path / 'run "<b>',
        [row(1)],
        config=f"note = '{evil}'  # {evil}\n",
        run={"task": evil, "title": evil, "size": evil, "status": evil, "data": {evil: {evil: evil}}},
        machine={"cpu": evil, "platform": evil},
        samples={"step-000001.txt": evil},
    )
    document = Document(page_of(folder))
    assert [tag for tag, _ in document.tags].count("script") == 1  # ours
    assert all(attributes["src"].startswith("data:") for tag, attributes in document.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in document.tags for name in attributes)
    assert document.text.count(evil) >= 7  # shown to the letter


def test_the_page_loads_nothing_and_forbids_the_rest(tmp_path):
    page = page_of(full_run(tmp_path / "run"))
    document = Document(page)
    for tag, attributes in document.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    (policy,) = [a["content"] for _, a in document.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_every_chart_is_well_formed_and_its_points_are_the_records(tmp_path):
    page = page_of(full_run(tmp_path / "run"))
    charts = re.findall(r'<div class="frame[^>]*data-x="(.*?)" data-y="(.*?)"( data-log)?>(<svg.*?</svg>)', page, re.S)
    assert len(charts) == 6  # bits, loss, rate, gradient, speed, balance
    by_label = {}
    for x_ends, y_ends, log, svg in charts:
        tree = ElementTree.fromstring(svg)
        assert tree.get("viewBox") == "0 0 10000 10000"
        assert all(re.fullmatch(r"[-MLHh0-9 ]+", path.get("d")) for path in tree.iter("path"))
        by_label[tree.get("aria-label").split(" over ")[0]] = (x_ends, y_ends, log, tree)

    def points(label, name):
        x_ends, y_ends, log, tree = by_label[label]
        (x0, x1), (y0, y1) = map(float, x_ends.split()), map(float, y_ends.split())
        (path,) = [p for p in tree.iter("path") if p.get("data-name") == name]
        drawn = np.array([[int(n) for n in p.split("h")[0].split()] for p in re.split("[ML]", path.get("d"))[1:]])
        up = 1 - drawn[:, 1] / 10000
        return x0 + drawn[:, 0] / 10000 * (x1 - x0), y0 * (y1 / y0) ** up if log else y0 + up * (y1 - y0)

    steps, values = points("Bits per byte", "validation")
    assert steps == pytest.approx([50, 100, 150, 200])
    assert values == pytest.approx([row(s)["val_bits_per_byte"] for s in (50, 100, 150, 200)], abs=2e-4)
    steps, values = points("Learning rate", "learning rate")
    assert values == pytest.approx([row(round(s))["lr"] for s in steps], abs=1e-5)
    steps, values = points("Gradient norm", "each step")
    assert values == pytest.approx([row(round(s))["grad_norm"] for s in steps], rel=1e-3)
    for label, expected in (("Gradient norm", 0.5), ("MaxVio of 2 MoE layers", 0.05)):  # optim.clip_norm, and chance
        _, ends, _, tree = by_label[label]
        low, high = map(float, ends.split())
        (rule,) = [p.get("d") for p in tree.iter("path") if p.get("class") == "rule"]
        height = 1 - int(re.fullmatch(r"M0 (\d+)H10000", rule)[1]) / 10000
        assert low * (high / low) ** height == pytest.approx(expected, rel=1e-3)


def test_a_validation_far_above_the_training_is_in_the_frame(tmp_path):
    rows = [row(step) | ({"val_bits_per_byte": 7.5, "val_loss": 9.5} if step == 50 else {}) for step in range(1, 60)]
    page = page_of(make_run(tmp_path / "run", rows))
    for label, value in (("Bits per byte", 7.5), ("Loss", 9.5)):
        (top,) = re.findall(rf'data-y="\S+ (\S+)">\s*<svg[^>]*aria-label="{label} over', page)
        assert float(top) >= value


def test_no_clipping_no_threshold(tmp_path):
    config = CONFIG.replace("clip_norm = 0.5", "clip_norm = inf")
    page = page_of(make_run(tmp_path / "run", [row(s, moe=False) for s in range(1, 60)], config=config))
    assert "Gradient norm" in page and 'class="rule"' not in page and "clipped" not in page


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run", [row(s) for s in range(1, 21)], tail='{"step": 21, "loss": 3.')
    assert "20 steps in" in Document(page_of(folder)).text


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_gaps_and_are_counted(tmp_path, bad):
    rows = [row(s) for s in range(1, 101)]
    for r in rows[30:33]:
        r.update(loss=bad, grad_norm=bad, bits_per_byte=bad, mfu=bad, tokens_per_second=bad, max_vio=[bad, bad])
    page = page_of(make_run(tmp_path / "run", rows))
    assert "3 of 100 steps have no finite value" in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) == 6 and not any("nan" in svg or "inf" in svg for svg in svgs)
    loss = next(svg for svg in svgs if 'aria-label="Loss' in svg)
    assert re.search(r'class="raw"[^>]* d="([^"]*)"', loss)[1].count("M") == 2  # two pieces


@pytest.mark.parametrize(("spike", "words"), [(1e25, "A spike to 1e+25 runs out of the frame"), (8.0, None)])
def test_a_spike_that_would_flatten_the_rest_runs_out_of_the_frame(tmp_path, spike, words):
    rows = [row(s, text=False) for s in range(1, 101)]
    rows[49]["loss"] = spike
    page = page_of(make_run(tmp_path / "run", rows))
    low, high = map(float, re.search(r'class="frame[^>]*data-y="(\S+) (\S+)"', page).groups())
    assert 2 < low < 3 and 3.5 < high < 10
    assert (words in page) if words else "A spike" not in page


def test_nothing_finite_at_all_still_makes_a_page(tmp_path):
    rows = [{"step": s, "loss": None, "lr": None, "grad_norm": None, "max_vio": [None]} for s in (1, 2)]
    page = page_of(make_run(tmp_path / "run", rows))
    assert "<svg" not in page and "not validated yet" in page


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs(tmp_path, steps):
    page = page_of(make_run(tmp_path / "run", [row(s) for s in range(1, steps + 1)]))
    assert len(re.findall("<svg", page)) == 6
    assert all(float(x.replace(",", "")).is_integer() for x in re.findall(r'class="x"[^>]*>([^<]*)<', page))


def test_one_step_is_told_and_seen(tmp_path):
    data = {"train": {"tokens": 40_000}}
    rows = [row(1) | {"mfu": 0.004}]
    text = page_of(make_run(tmp_path / "run", rows, run={"task": "lm", "data": data}))
    words = Document(text).text
    assert "1 step in 0.5 s" in words and "less than a tenth of the data" in words
    assert "uses less than 1% of the machine's" in words
    assert "P99" not in words and "P90" not in words  # of one norm
    lines = re.findall(r'<path class="([^"]*line[^"]*)"', text)
    assert len(lines) >= 6 and all(name.endswith(" lone") for name in lines)
    many = page_of(make_run(tmp_path / "many", [row(s) for s in range(1, 3)]))
    assert "2 steps in" in many and ' lone"' not in many


def test_perfect_balance_and_a_floor_of_zero_are_drawn(tmp_path):
    rows = [row(s) | {"max_vio": [0.0, 0.0], "max_vio_floor": 0.0} for s in range(1, 60)]
    assert "Balance of the experts" in page_of(make_run(tmp_path / "run", rows))


def test_a_long_run_stays_light(tmp_path):
    rng = np.random.default_rng(0)
    base = row(7) | {"max_vio": [0.1] * 8}
    rows = []
    for step, noise in enumerate(rng.normal(size=60_000), 1):
        rows.append(base | {"step": step, "loss": 3 + noise, "bits_per_byte": 2 + noise, "grad_norm": math.exp(noise)})
        if step % 100 == 0:
            rows[-1]["expert_load"] = rng.dirichlet(np.full(64, 9.0), 8).tolist()
            rows[-1]["val_bits_per_byte"] = rows[-1]["val_loss"] = 2 + noise
    rows[31_415]["grad_norm"] = 987654.0
    folder = make_run(tmp_path / "run", rows)
    path = write_report(folder)
    assert path.stat().st_size < 700_000
    page = path.read_text(encoding="utf-8")
    gradient = page[page.index("Gradient norm over") : page.index("Speed</h3>")]
    assert "1M" in re.findall(r'class="y"[^>]*>([^<]*)<', gradient)  # the axis reaches the one spike


def test_writing_again_replaces_the_page(tmp_path):
    folder = make_run(tmp_path / "run", [row(s) for s in range(1, 11)])
    first = page_of(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(11)) + "\n")
    second = page_of(folder)
    assert "10 steps in" in first and "11 steps in" in second
    assert second == page_of(folder)


@pytest.mark.parametrize("kind", ["adaptive", "spectral", "none"])
def test_a_threshold_is_drawn_only_where_it_applies(tmp_path, kind):
    """The axis is the global norm: only global clipping has a fixed place on it."""
    config = CONFIG.replace("clip_norm = 0.5", f'clip_norm = 0.5\nclip = "{kind}"')
    page = page_of(make_run(tmp_path / "run", [row(s, moe=False) for s in range(1, 60)], config=config))
    assert "Gradient norm" in page and 'class="rule"' not in page
