"""Every page in a real browser, at the width of a desk and of a phone, light and dark.

What a parser cannot see: that nothing is asked of the network, that the script runs, that nothing is wider than a
phone, that pictures decode. Without Chromium the tests skip, and fail where CI says that it must be there.
"""

import os
import shutil

import numpy as np
import pytest
from tests.cli.command import quintic
from tests.codec.toys import picture, smooth_model

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
PAGES = {
    "lm": ("Bits per byte", "Loss", "Learning rate", "Gradient norm", "Speed", "Spectra of the matrices",
           "Balance of the experts", "Load of every expert"),
    "ddpm": ("Loss", "Learning rate", "Gradient norm", "Speed", "Spectra of the matrices"),
    "tarflow": ("Bits per dimension", "Loss", "Learning rate", "Gradient norm", "Speed", "Spectra of the matrices"),
    "race": ("Validation loss",),
    "comparison": ("Validation bits per byte over steps", "Validation bits per byte over seconds"),
    "codec": ("PSNR by the mean size of a file",),
}  # fmt: skip
IMAGES = {"lm": 2, "ddpm": 2, "tarflow": 2, "race": 0, "comparison": 0, "codec": 6}  # heat maps, samples, pictures
SHORT = ["--size", "tiny", "engine.steps=4", "engine.eval_every=2", "engine.sample_every=2", "engine.diagnose_every=2"]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        words = "no chromium on this machine; install it (apt-get install chromium) to look at the pages"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    if os.environ.get("CI"):
        import playwright.sync_api as api
    else:
        api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: dev)")
    with api.sync_playwright() as playwright:
        # Without its sandbox it runs as root and in containers; the pages are our own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    """One page of each kind, made by the commands that a user would give."""
    folder = tmp_path_factory.mktemp("pages")
    book = folder / "book.txt"
    book.write_text("the whale swam under the ship and the captain looked at the sea.\n" * 60, encoding="utf-8")
    drawn = ["data.drawn=120", "data.size=8"]
    smooth_model().save(folder / "model.safetensors")
    (folder / "pictures").mkdir()
    for i in range(2):
        picture(15, 10 + i, "L" if i else "RGB", seed=i).save(folder / "pictures" / f"{i}.png")
    for command in (
        ["train", book, *SHORT, "engine.load_every=1", "--out", folder / "lm"],
        ["train", "--task", "ddpm", *SHORT, *drawn, "--out", folder / "ddpm"],
        ["train", "--task", "tarflow", *SHORT, *drawn, "tarflow.noise=uniform", "--out", folder / "tarflow"],
        ["race", book, *SHORT[2:], "lm.num_layers=2", "--lr", "0.01", "--lr", "0.02", "--seeds", "1", "--no-match",
         "--out", folder / "race"],
        ["codec", "eval", folder / "pictures", "--sizes", 60, "--sizes", 90, "--model", folder / "model.safetensors",
         "--out", folder / "codec"],
    ):  # fmt: skip
        assert quintic(*command) == 0, command
    runs = sorted((folder / "race").glob("*-seed0-*"))
    assert quintic("report", *runs, "--out", folder / "comparison" / "report.html") == 0
    names = {"race": "race.html", "codec": "rates.html"}
    return {kind: folder / kind / names.get(kind, "report.html") for kind in PAGES}


class Visit:
    """A page that was opened, and what the browser said and asked for meanwhile."""

    def __init__(self, browser, path, width, scheme):
        self.said, self.asked = [], []
        self.context = browser.new_context(
            viewport=dict(zip(("width", "height"), WIDTHS[width], strict=True)), color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def look(self, script):
        """The value of a piece of JavaScript."""
        return self.page.evaluate(script)


@pytest.fixture
def visit(browser, pages):
    opened = []

    def visiting(kind, width="desk", scheme="light"):
        opened.append(Visit(browser, pages[kind], width, scheme))
        return opened[-1]

    yield visiting
    for each in opened:
        each.context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", PAGES)
def test_every_figure_is_there_and_said_in_words(visit, kind, width):
    seen = visit(kind, width)
    assert tuple(seen.look("[...document.querySelectorAll('figure > h3')].map(e => e.innerText)")) == PAGES[kind]
    charts = seen.look("""[...document.querySelectorAll('svg')].map(e => ({
        role: e.getAttribute('role'), words: e.getAttribute('aria-label'), wide: e.getBoundingClientRect().width,
        high: e.getBoundingClientRect().height, lines: e.querySelectorAll('path[data-name]').length}))""")
    assert len(charts) >= len([name for name in PAGES[kind] if name != "Load of every expert"])
    for chart in charts:
        assert chart["role"] == "img" and len(chart["words"].split()) >= 5, chart
        assert chart["wide"] > 150 and chart["high"] > 150 and chart["lines"], chart
    images = seen.look("""[...document.querySelectorAll('img')].map(e => ({
        words: e.alt, decoded: e.complete && e.naturalWidth > 0, wide: e.getBoundingClientRect().width}))""")
    assert len(images) == IMAGES[kind]
    for image in images:
        assert len(image["words"].split()) >= 3 and image["decoded"] and image["wide"] > 100, image


@pytest.mark.parametrize(("width", "scheme"), [("desk", "light"), ("phone", "dark")])
@pytest.mark.parametrize("kind", PAGES)
def test_nothing_is_loaded_said_or_wider_than_the_screen(visit, kind, width, scheme):
    seen = visit(kind, width, scheme)
    seen.look("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert seen.look("document.documentElement.scrollWidth") <= WIDTHS[width][0]
    # What scrolls by itself may be wider inside; nothing else may stand out of the page on the right.
    outside = seen.look("""[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))""")
    assert outside == []
    assert [url for url in seen.asked if not url.startswith(("file:", "data:"))] == []
    assert seen.said == []


@pytest.mark.parametrize("kind", PAGES)
def test_text_stands_out_from_the_paper_by_day_and_by_night(visit, kind):
    """Contrast of 4.5, the WCAG's measure for text, of every colour that text has on the page."""
    for scheme in ("light", "dark"):
        seen = visit(kind, "desk", scheme)
        paper = seen.look("getComputedStyle(document.body).backgroundColor")
        assert (luminance(paper) > 0.5) == (scheme == "light")
        colours = set(
            seen.look("""[...document.querySelectorAll('main *')].filter(e => [...e.childNodes].some(
            n => n.nodeType === 3 && n.data.trim())).map(e => getComputedStyle(e).color)""")
        )
        for colour in colours:
            low, high = sorted((luminance(colour), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, colour)


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)``."""
    rgb = np.array([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_the_pointer_reads_a_value_off_every_page(visit):
    for kind in PAGES:
        seen = visit(kind)
        frame = seen.page.locator(".frame").first
        frame.scroll_into_view_if_needed()
        box = frame.bounding_box()
        seen.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
        tip = seen.page.locator(".tip").inner_text()
        assert any(character.isdigit() for character in tip), kind
        seen.page.mouse.move(1, 1)
        assert seen.page.locator(".tip").count() == 0


def test_the_colours_of_a_chart_tell_its_lines_apart(visit):
    """Lines without an order differ in colour and in dashes; their keys in the legend are the same ones."""
    for kind, lines in (("race", 2), ("codec", 3)):
        seen = visit(kind)
        drawn = seen.look("""[...document.querySelectorAll('.frame path.line')].map(e => [
            getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray])""")
        keys = seen.look("[...document.querySelectorAll('.key i.line')].map(e => getComputedStyle(e).borderTopColor)")
        assert len(drawn) >= lines and len({tuple(d) for d in drawn}) == len(drawn)
        assert [colour for colour, _ in drawn] == keys and len(set(keys)) == len(keys)
