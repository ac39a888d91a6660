"""How many of the ten best items fifty exact scores find: CUR retrieval (posts 9336, 10662) on two scorers.

*Digits*: a network trained to compare two images of scikit-learn's digits, three seeds. *WordNet*: definitions searched
by usage sentences, with the late interaction of MiniLM's token vectors as the exact score (mean over the query's tokens
of the best cosine with a token of the item); its mean-pooled vectors are the bi-encoder whose best items are re-ranked.
All contestants may ask for the same number of exact scores, and answer with the best of what they asked for. A seed is
one of scorer, queries and random items on the digits; on WordNet, of random items only: the queries stay the same.

Needs the extra ``bench``, and ``python -m benchmarks.fetch_data wordnet minilm`` for the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, table
from benchmarks.fetch_data import fetch
from benchmarks.plot import Line, draw, image
from benchmarks.study import one_thread
from quintic.core.machine import describe
from quintic.lowrank import CurIndex

FOLDER = Path("runs") / "benchmarks" / "retrieval"
SEEDS = (0, 1, 2)
ANCHORS, QUERIES = 200, 100
WORDNET_ITEMS, WORDNET_ANCHORS = 2000, 300
BUDGETS = (20, 50, 100, 200)
KS = (1, 10)
BAR = 0.95
DIP = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Items scored, in anchor queries, for the error of the prediction."""


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Scores of (anchor queries, items) and (queries, items) by a trained network."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images, labels = torch.tensor(bunch.data / 16.0, dtype=torch.float32), torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(1500):
        i, j = (torch.randint(len(images), (256,), generator=generator) for _ in range(2))
        near = 2.0 * (labels[i] == labels[j]) - (images[i] - images[j]).square().sum(-1) / 10
        loss = (net(torch.cat([images[i], images[j]], -1)).squeeze(-1) - near).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    order = torch.randperm(len(images), generator=generator)
    queries, items = order[: ANCHORS + QUERIES], order[ANCHORS + QUERIES :]
    with torch.no_grad():
        rows = [
            net(torch.cat([images[q].expand(len(items), -1), images[items]], -1)).squeeze(-1).double() for q in queries
        ]
    scores = torch.stack(rows)
    return scores[:ANCHORS], scores[ANCHORS:]


def synsets() -> tuple[list[str], list[tuple[str, int]]]:
    """WordNet's ``words: definition``, and usage sentences with the number of their synset."""
    items, sentences = [], []
    for file in sorted(fetch("wordnet").glob("data.*")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            facts, gloss = line.split(" | ", 1)
            fields = facts.split()
            words = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            definition = re.sub(r'"[^"]*"', "", gloss).strip(" ;")
            for sentence in re.findall(r'"([^"]*)"', gloss):
                if any(word.lower() in sentence.lower() for word in words):
                    sentences.append((sentence, len(items)))
            items.append(f"{', '.join(words)}: {definition}")
    return items, sentences


def wordnet() -> dict[str, Tensor]:
    """Scores (queries, items) of late interaction and of the bi-encoder, kept in a file after the first time."""
    path = FOLDER / "wordnet.npz"
    if not path.exists():
        texts, sentences = synsets()
        draws = np.random.default_rng(0)
        chosen = [sentences[i] for i in draws.permutation(len(sentences))[: WORDNET_ANCHORS + QUERIES]]
        gold = sorted({number for _, number in chosen})
        others = [int(i) for i in draws.permutation(len(texts)) if int(i) not in set(gold)]
        items = (gold + others)[:WORDNET_ITEMS]
        vectors = [_encode([texts[i] for i in items]), _encode([sentence for sentence, _ in chosen])]
        scores = _late_interaction(vectors[1], vectors[0])
        pooled = [torch.stack([nn.functional.normalize(x.mean(0), dim=0) for x in part]) for part in vectors]
        FOLDER.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, late=scores.half().numpy(), pooled=(pooled[1] @ pooled[0].T).half().numpy())
    kept = np.load(path)
    return {name: torch.from_numpy(kept[name]).double() for name in ("late", "pooled")}


@torch.no_grad()
def _encode(texts: list[str]) -> list[Tensor]:
    """Unit token vectors of each text, without the special tokens at its ends."""
    import transformers

    folder = str(fetch("minilm"))
    model: Any = transformers.AutoModel.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model.eval()
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 32):
        part = order[start : start + 32]
        batch = tokenizer([texts[i] for i in part], return_tensors="pt", padding=True, truncation=True, max_length=64)
        states = nn.functional.normalize(model(**batch).last_hidden_state, dim=-1)
        for i, vectors, mask in zip(part, states, batch["attention_mask"], strict=True):
            found[i] = vectors[1 : int(mask.sum()) - 1].clone()
    return found


def _late_interaction(queries: list[Tensor], items: list[Tensor]) -> Tensor:
    lengths = torch.tensor([len(x) for x in items])
    every, owner = torch.cat(items), torch.repeat_interleave(torch.arange(len(items)), lengths)
    rows = []
    for query in queries:
        best = torch.full((len(query), len(items)), -2.0)
        best.scatter_reduce_(1, owner.expand(len(query), -1), query @ every.T, "amax")
        rows.append(best.mean(0))
    return torch.stack(rows)


def recall(truth: Tensor, asked: Callable[[int, int], Tensor]) -> dict[str, float]:
    """Share of the k best among what was asked for: {"k@budget": share}."""
    found = {}
    for budget in BUDGETS:
        scored = [asked(i, budget) for i in range(len(truth))]
        for k in KS:
            hits = [
                len(set(row.topk(k).indices.tolist()) & set(s.tolist())) for row, s in zip(truth, scored, strict=True)
            ]
            found[f"{k}@{budget}"] = sum(hits) / (k * len(truth))
    return found


def plain(anchor_scores: Tensor, truth: Tensor, seed: int) -> Callable[[int, int], Tensor]:
    """ANNCUR as published: half of the budget to random items, s_J R_J^+ R, the best of the rest."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(anchor_scores.shape[1], generator=generator)

    def asked(i: int, budget: int) -> Tensor:
        known = order[: budget // 2]
        guess = truth[i, known] @ torch.linalg.pinv(anchor_scores[:, known]) @ anchor_scores
        guess[known] = -torch.inf
        return torch.cat([known, guess.topk(budget - len(known)).indices])

    return asked


def contest(anchor_scores: Tensor, truth: Tensor, seed: int, pooled: Tensor | None = None) -> dict[str, Any]:
    order = torch.randperm(truth.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    index, once = CurIndex(anchor_scores, seed=seed), CurIndex(anchor_scores, seed=seed, first=0.5, rounds=1)

    def ask(index: CurIndex) -> Callable[[int, int], Tensor]:
        return lambda i, budget: index.search(lambda items: truth[i, items], 1, budget).scored

    arms = {
        "random items": lambda i, budget: order[:budget],
        "ANNCUR, random items, no noise": plain(anchor_scores, truth, seed),
        "skeleton, noise fitted, one round": ask(once),
        "CurIndex": ask(index),
    }
    if pooled is not None:
        arms["bi-encoder, re-ranked"] = lambda i, budget: pooled[i].topk(budget).indices
        for part in (0.5, 0.8):
            mixed = CurIndex(anchor_scores, seed=seed, first=part)
            arms[f"bi-encoder for {part:.0%}, then CurIndex"] = lambda i, budget, mixed=mixed: (
                mixed.search(lambda items: truth[i, items], 1, budget, proposed=pooled[i].topk(budget).indices).scored
            )
    return {name: recall(truth, asked) for name, asked in arms.items()}


def dip(anchor_scores: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Relative error of predictions from as many random items as so many anchor queries."""
    index, q = CurIndex(anchor_scores), len(anchor_scores)
    order = torch.randperm(truth.shape[1], generator=torch.Generator().manual_seed(0))
    spread = float((truth - anchor_scores.mean(0)).norm())
    found: dict[str, list[float]] = {"plain": [], "CurIndex": []}
    for part in DIP:
        known = order[: round(part * q)]
        guess = truth[:, known] @ torch.linalg.pinv(anchor_scores[:, known]) @ anchor_scores
        found["plain"].append(float((guess - truth).norm()) / spread)
        ours = torch.stack([index.predict(known, row[known]) for row in truth])
        found["CurIndex"].append(float((ours - truth).norm()) / spread)
    return found


def run() -> dict[str, Any]:
    with one_thread():
        sets: dict[str, Any] = {"digits": [], "wordnet": []}
        for seed in SEEDS:
            R, truth = digits(seed)
            sets["digits"].append(contest(R, truth, seed))
            print("digits", seed, sets["digits"][-1]["CurIndex"], flush=True)
        scores = wordnet()
        R, truth = scores["late"][:WORDNET_ANCHORS], scores["late"][WORDNET_ANCHORS:]
        for seed in SEEDS:
            sets["wordnet"].append(contest(R, truth, seed, scores["pooled"][WORDNET_ANCHORS:]))
        print("wordnet", sets["wordnet"][-1], flush=True)
        dips = {"wordnet": dip(R, truth)}
    return {"machine": describe(torch.device("cpu"), torch.float64), "seeds": list(SEEDS), "sets": sets, "dip": dips}


def _mean(result: dict[str, Any], name: str, arm: str, key: str) -> float:
    return float(np.mean([seed[arm][key] for seed in result["sets"][name]]))


def section(result: dict[str, Any]) -> str:
    titles = {
        "digits": f"**Digits**, {ANCHORS} anchor queries, 1,497 items, {QUERIES} queries",
        "wordnet": f"**WordNet**, {WORDNET_ANCHORS} anchor queries, {WORDNET_ITEMS:,} items, {QUERIES} queries",
    }
    keys = [f"{k}@{budget}" for k in KS for budget in BUDGETS]
    head = ("asked for by", *(f"best {key.replace('@', ' in ')}" for key in keys))
    parts = [
        "## Retrieval by a skeleton of scores",
        "`python -m benchmarks retrieval`: share of the best, or the ten best, items that are found with 20, 50, "
        f"100 or 200 exact scores;\nmean of {len(result['seeds'])} seeds.",
    ]
    for name, runs in result["sets"].items():
        rows = [(arm, *(f"{_mean(result, name, arm, key):.1%}" for key in keys)) for arm in runs[0]]
        parts += [titles[name], table(head, rows)]
    parts.append(image("retrieval-dip", "Error of the predicted scores against the number of exact ones"))
    return "\n\n".join(parts)


def plots(result: dict[str, Any]) -> dict[str, str]:
    return {
        "retrieval-dip": draw(
            "WordNet: error of predicted scores, random items scored", [
                Line(name, [part * WORDNET_ANCHORS for part in DIP], values)
                for name, values in result["dip"]["wordnet"].items()
            ],
            x="exact scores", y="error / error of the mean", log_y=True, rules={"mean of the anchor queries": 1.0},
        )
    }  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    ours, theirs = (_mean(result, "digits", arm, "10@50") for arm in ("CurIndex", "ANNCUR, random items, no noise"))
    alone, ranked = (_mean(result, "wordnet", arm, "10@50") for arm in ("CurIndex", "bi-encoder, re-ranked"))
    errors, plain_errors = (result["dip"]["wordnet"][name] for name in ("CurIndex", "plain"))
    there = DIP.index(1.0)
    smooth = all(b <= a * 1.02 for a, b in pairwise(errors))
    n = len(result["seeds"])
    return [
        Claim("Fifty exact scores of 1,497 find 95 % of the ten best digits", "ours",
              f"{ours:.1%} (ANNCUR {theirs:.1%})", n, "yes" if ours >= BAR else "no", "retrieval"),
        Claim("Without a bi-encoder as many are found as by re-ranking one's best, WordNet, fifty of 2,000", "ours",
              f"{alone:.1%} of the ten best, re-ranked {ranked:.1%}", 1, "yes" if alone >= ranked else "no",
              "retrieval"),
        Claim("No dip of accuracy where as many items are scored as there are anchor queries", "ANNCUR",
              f"error there {plain_errors[there]:.1f} plain, {errors[there]:.2f} here", 1,
              "yes" if smooth else "no", "retrieval"),
    ]  # fmt: skip
