"""Every command and every example of the README runs, and every file it points at is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from quintic.assets import corpus_path
from quintic.cli.app import main
from quintic.data.drawings import draw

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHORT = ["engine.steps=2", "lm.num_layers=2"]  # appended where a command would train a preset to its end


def commands() -> list[list[str]]:
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("quintic ", "torchrun "))]


def test_every_command_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = corpus_path().read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(text[:150_000], encoding="utf-8")
    (tmp_path / "my_notes").mkdir()
    for i in range(3):
        (tmp_path / "my_notes" / f"{i}.md").write_text(text[i * 9000 : (i + 1) * 9000], encoding="utf-8")
    pixels, _ = draw(1, 28, 1, seed=0, label="readme")
    Image.fromarray(pixels[0, :, :, 0]).save(tmp_path / "picture.png")
    (tmp_path / "table.csv").write_text("name,a,b,c\nx,1,2,3\ny,2,4,6.1\nz,0,1,0\n", encoding="utf-8")
    found = commands()
    assert {words[1] for words in found if words[0] == "quintic"} == {
        "train", "resume", "generate", "evaluate", "report", "roles", "doctor", "race", "verify-resume", "export",
        "import", "plan", "codec", "matrix",
    }  # fmt: skip
    for program, *words in found:
        if program == "torchrun":
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True, env=environment)
            continue
        whole = words[0] == "train" and "--out" not in words and "--settings" not in words
        with pytest.raises(SystemExit) as end:
            main([*words, *SHORT] if whole else words)
        assert not end.value.code, (words, capsys.readouterr().err)
    assert (tmp_path / "runs" / "a" / "report.html").is_file()
    assert Image.open("decoded.png").size == (28, 28) and Path("picture.qdc").stat().st_size <= 100


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z-]+)", "\n".join(text for kind, text in BLOCKS if kind == "sh"), re.MULTILINE)
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_examples_run():
    namespace: dict = {}
    examples = [text for kind, text in BLOCKS if kind == "python"]
    assert len(examples) >= 3
    for text in examples:
        exec(compile(text, "README.md", "exec"), namespace)
    assert len(namespace["text"]) == 20


def test_links_point_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for target in re.findall(r"\| `([a-z]+/[a-z_./]*)` \|", README):
        assert (ROOT / "src" / "quintic" / target).exists(), target
