"""CUR of a table with named rows and columns: which chapters and which words explain a book?

The table counts how often each of the 60 commonest words stands in each chapter of Moby Dick, per thousand words. CUR
writes it by a few of its own rows and columns, so that the answer has names: these chapters, these words. One sees them
for rank 6, the error beside the least that any matrix of that rank can have, and what choosing by chance would cost.

    python examples/cur_of_a_table.py
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

import numpy as np

from quintic.assets import corpus_path
from quintic.lowrank import cur, svd


def table(words: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Counts (chapters, words) per thousand words, with the names of both."""
    text = corpus_path().read_text(encoding="utf-8")
    _, *parts = re.split(r"^CHAPTER \d+\. (.*)$", text, flags=re.MULTILINE)
    counts = {
        name.rstrip("."): Counter(re.findall(r"[a-z]+", body.lower()))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
    common = [word for word, _ in sum(counts.values(), Counter()).most_common(words)]
    rows = [[1000.0 * count[word] / count.total() for word in common] for count in counts.values()]
    return np.array(rows), list(counts), common


def main(argv: list[str] | None = None) -> None:
    """Choose, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=6)
    rank = parser.parse_args(argv).rank
    counts, chapters, words = table(60)
    print(f"{counts.shape[0]} chapters, {counts.shape[1]} words")
    found = cur(counts, rank, row_labels=chapters, column_labels=words)
    print("words:   ", ", ".join(found.column_names or []))
    print("chapters:", "; ".join(found.row_names or []))
    chance = np.mean([cur(counts, rank, method="uniform", seed=seed).error() for seed in range(20)])
    least = svd(counts, rank).error()
    print(f"relative error {found.error():.3f}; by chance {chance:.3f}; least of any rank {rank}: {least:.3f}")
    # C and R are parts of the table, as they are: no mixture of chapters, no negative counts.
    assert np.array_equal(found.C, counts[:, found.cols]) and np.array_equal(found.R, counts[found.rows])


if __name__ == "__main__":
    main()
