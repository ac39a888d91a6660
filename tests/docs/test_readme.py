"""The table of methods names files that are there; commands, examples and links are run by test_pages.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_of_the_methods_are_there():
    targets = re.findall(r"\| `([a-z]+/[a-z_./]*)` \|", README)
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / "src" / "quintic" / target).exists(), target
