"""``python -m docs.figures [NAME ...]``: compute figures (all by default) and write docs/images/posts/NAME.svg."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from docs.figures import NAMES

HERE = Path(__file__).parent.parent / "images" / "posts"


def main(names: list[str]) -> None:
    """Write the figures named, or all."""
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no such figure: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        began = time.perf_counter()
        (HERE / f"{name}.svg").write_text(import_module(f"docs.figures.{name}").figure(), encoding="utf-8")
        print(f"docs/images/posts/{name}.svg  {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
