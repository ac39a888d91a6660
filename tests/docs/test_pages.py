"""Every command and every example of the pages runs, in order, and every link points at something.

A page is read as a reader would follow it: its ```sh and ```python blocks run top to bottom in one folder, which
starts with some files (a book, notes, pictures, a table) and, where the page says ``<!-- given: runs/book -->``, with
a small trained run. Trainings and races are cut short by settings appended to the command. A block that cannot run
here stands behind ``<!-- not run: why -->``. (The examples of docs/posts are run by test_posts.py; the Chinese pages
have the same blocks as the English ones, see test_chinese.py.)
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.command import quintic

from quintic.assets import corpus_path
from quintic.cli.app import app
from quintic.cli.wiring import KINDS, section_types
from quintic.data.drawings import draw

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    *sorted(ROOT.glob("README*.md")),
]
ELSEWHERE = [*(ROOT / "docs" / "posts").glob("*.md"), *(ROOT / "docs" / "zh").glob("*.md"), ROOT / "README.zh.md"]
"""Pages whose blocks other tests are about."""

FENCE = re.compile(r"((?:^<!--[^\n]*-->\n+)?)^(```+)([^\n`]*)\n(.*?)^\2 *$", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "toml", "yaml", "json", "html", ""}
"""Languages of blocks that nobody runs."""
INSTALL = ("pip ", "python -m pip ", "python -m venv", "git clone", "make ")
"""What these start is tested elsewhere: the wheel, the Makefile."""
SHORT = {
    "lm": "engine.steps=4 engine.diagnose_every=0 lm.num_layers=2 lm.context=32 lm.d_model=32 engine.batch_size=4",
    "tarflow": "engine.steps=2 engine.diagnose_every=0 data.drawn=200",
    "ddpm": "engine.steps=2 engine.diagnose_every=0 data.drawn=200",
}
"""Settings that end a training soon, appended to its command: the last one counts."""
LESS = {"--preset fine": "--preset fast", "--limit 20": "--limit 1"}
"""Words of commands, and cheaper ones."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every block that runs."""
    found = []
    for comment, _, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        language = language.split()[0] if language.split() else ""
        if language in SHOWN or language.startswith("{"):
            continue
        if "not run:" in comment:
            assert re.search(r"not run: \w+ \w+", comment), f"{page}: say why a block is not run"
            continue
        assert language in ("sh", "python"), f"{page}: no rule for a block of {language!r}"
        found.append((language, text))
    return found


def commands(text: str) -> list[str]:
    """Lines of a shell block, continued ones joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with what readers are supposed to have, and a run."""
    folder = tmp_path_factory.mktemp("material")
    text = corpus_path().read_text(encoding="utf-8")
    (folder / "book.txt").write_text(text[:60_000], encoding="utf-8")
    (folder / "other.txt").write_text(text[100_000:130_000], encoding="utf-8")
    (folder / "my_notes").mkdir()
    for i in range(3):
        (folder / "my_notes" / f"{i}.md").write_text(text[i * 9000 : (i + 1) * 9000], encoding="utf-8")
    pixels, kinds = draw(24, 28, 1, seed=0, label="pages")
    for i, (picture, kind) in enumerate(zip(pixels[..., 0], kinds, strict=True)):
        place = folder / "pictures" / ("round" if kind % 2 else "other") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place)
    Image.fromarray(pixels[0, :, :, 0]).save(folder / "picture.png")
    Image.new("L", (28, 28), 255).save(folder / "mask.png")
    (folder / "table.csv").write_text("name,a,b,c,d\nx,1,2,3,1\ny,2,4,6.1,0\nz,0,1,0,2\n", encoding="utf-8")
    shell(folder, "quintic train book.txt --size tiny --out runs/book")
    return folder


def shell(folder: Path, line: str) -> None:
    """Run one line of a shell block in a folder."""
    for dear, cheap in LESS.items():
        line = line.replace(dear, cheap)
    words = shlex.split(line, comments=True)
    if words[:2] == ["quintic", "train"] and "--settings" not in words:
        task = words[words.index("--task") + 1] if "--task" in words else "lm"
        # A run that starts from another one has its shape.
        keep = {"engine"} if "--from" in words else {"engine", "data", "lm"}
        words += [word for word in SHORT[task].split() if word.split(".")[0] in keep]
        if "--size" in words:
            words[words.index("--size") + 1] = "tiny"
        else:
            words += ["--size", "tiny"]
    elif words[:2] == ["quintic", "race"]:
        words += [*SHORT["lm"].split(), "engine.steps=1", "--seeds", "1", "--no-match"]
    elif words[:3] in (["quintic", "codec", "encode"], ["quintic", "codec", "restore"]) and "--preset" not in words:
        words += ["--preset", "fast"]
    old = Path.cwd()
    os.chdir(folder)
    try:
        if words[0] == "quintic":
            assert (code := quintic(*words[1:])) == 0, f"{line}: exit code {code}"
        else:
            if words[0] == "torchrun":
                words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SHORT["lm"].split()]
                line = shlex.join(words)
            subprocess.run(["sh", "-c", line], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        os.chdir(old)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in ELSEWHERE], ids=name)
def test_what_a_page_says_runs(page, material, tmp_path, monkeypatch):
    monkeypatch.setattr("quintic.engine.race._GROWTH", 0)  # races end with the rates they begin with
    given = re.findall(r"<!-- given: (.*?) -->", page.read_text(encoding="utf-8"))
    for entry in material.iterdir():
        if entry.name != "runs":
            (shutil.copytree if entry.is_dir() else shutil.copy)(entry, tmp_path / entry.name)
    for run in given:
        shutil.copytree(material / run, tmp_path / run)
    namespace: dict = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            old = Path.cwd()
            os.chdir(tmp_path)
            try:
                exec(compile(text, str(page), "exec"), namespace)
            finally:
                os.chdir(old)
            continue
        for line in commands(text):
            if not line.startswith(INSTALL):
                shell(tmp_path, line)


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    plain = re.sub(r"\{[a-z:]+\}|\]\([^)]*\)", "", heading.lower())
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_point_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: no heading for {target}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    targets = {target for text in texts for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_options_and_settings_in_the_words_exist():
    """Of blocks it is their running that shows it."""
    helped = app.generate_docs(output_format="markdown")
    settings = {
        f"{section}.{field.name}"
        for task in KINDS
        for section, kind in section_types(task).items()
        for field in dataclasses.fields(kind)
    }
    found = set()
    for page in PAGES:
        words = re.sub(r"\{py:\w+\}`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        for code in re.findall(r"`([^`\n]+)`", words):
            found |= {(page.name, name) for name in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)}
            if re.match(r"[a-z. ]+=?", code):
                found |= {
                    (page.name, name) for name in re.findall(r"\b(?:lm|optim|engine|data|tarflow|ddpm)\.[a-z_]+", code)
                }
    unknown = {(page, name) for page, name in found if name not in settings and name not in helped}
    assert len(found) > 60 and unknown <= {(page, name) for page, name in found if name in ("--help", "--signal")}


def test_every_verb_is_shown_at_work():
    lines = [line for page in PAGES for kind, text in blocks(page) if kind == "sh" for line in commands(text)]
    shown = {tuple(line.split()[1:3]) for line in lines if line.startswith("quintic ")}
    verbs = [(verb, *below) for verb in verbs_of(app) for below in [(name,) for name in verbs_of(app[verb])] or [()]]
    missing = [verb for verb in verbs if not any(found[: len(verb)] == verb for found in shown)]
    assert len(verbs) > 15 and not missing


def verbs_of(commands) -> list[str]:
    """Names of verbs, without options such as --help."""
    return [name for name in commands if not name.startswith("-")]


def test_the_page_of_formats_names_all_that_a_run_holds(material):
    page = (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    run = material / "runs" / "book"
    checkpoint = max((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = {key for row in rows for key in row if not key.startswith("val_")}
    names = {path.name for path in (*run.iterdir(), *checkpoint.iterdir())} | metrics | {*state, *manifest}
    assert len(names) > 30 and [name for name in sorted(names) if f"`{name}" not in page] == []


def test_the_table_of_roles_is_what_is_printed(capsys):
    text = (ROOT / "docs" / "howto" / "use-muon.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^optimizer = ", text, re.M | re.S)
    shown = re.search(r"^```text\n(parameter .*?)```", text, re.M | re.S)
    assert code and shown
    exec(code[1], {})
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown[1].splitlines()
