"""Top-k items of a query by few exact scores: CUR retrieval (post kexue.fm/archives/9336; ANNCUR arXiv 2210.12579).

An exact scorer s(query, item), say a cross-encoder, is too slow for all n items. Offline the scores R (q, n) of q
*anchor queries* with all items are computed. Online a new query is scored exactly with a few items J; the rest is
predicted from how the anchor queries' scores go together. ANNCUR predicts s ~ s_J R_J^+ R, which blows up where R_J is
nearly singular: recall dips when there are as many items in J as anchor queries. Here the prediction is the posterior
mean of a Gaussian with the anchor scores' mean m and covariance C = (R - m)'(R - m) / (q - 1), observed with noise,

    s ~ m + C[:, J] (C[J, J] + lambda I)^-1 (s_J - m_J),

and lambda is fitted to anchor queries that are left out. The first J are a skeleton of R's columns, chosen offline by a
rule of :mod:`quintic.lowrank.selection`; the budget left is spent in rounds on the items predicted best (ADACUR, arXiv
2305.02996), so that every exact score is also a candidate of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from quintic.core import CheckpointError, ConfigError, DataError, suggest
from quintic.core.files import atomic_write
from quintic.core.precision import in_float64
from quintic.linalg.sketch import seeded
from quintic.lowrank.result import whole_number
from quintic.lowrank.selection import RULES, Method, select_columns

__all__ = ["CurIndex", "SearchResult"]

_KIND = "quintic.cur-index"
_FOLDS = 5
_NOISES = tuple(10.0 ** (i / 2) for i in range(-12, 3))
"""Tried for lambda, in mean variances of an item's scores."""


@dataclass(frozen=True)
class SearchResult:
    """Answer to one query."""

    items: Tensor
    """(k,) int64, the best first."""
    scores: Tensor
    """(k,) exact scores, in the precision of the anchor scores, at least float32."""
    scored: Tensor
    """(calls,) int64, every item that was scored exactly, in the order of asking."""
    predicted: Tensor
    """(n,) scores of all items: exact where scored, predicted elsewhere."""

    @property
    def calls(self) -> int:
        """Exact scores that were asked for."""
        return len(self.scored)


class CurIndex:
    """Index of n items from the exact scores of q anchor queries.

    Args:
        anchor_scores: (q, n) floating point, q >= 2; kept in float32 if they come in less.
        first: Part of the budget that goes to the skeleton's items, whatever the query; 0 < first <= 1.
        rounds: In how many parts the rest is spent, each after a new prediction. With 1 this is ANNCUR.
        method: Rule that chooses the skeleton's items.
        noise: lambda, in mean variances of an item's scores; None fits it to left-out anchor queries.
        seed: Of what rule and fit draw.

    Raises:
        ConfigError: A parameter is out of range.
        DataError: The scores are not a finite matrix.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> users, films = torch.randn(60, 5, generator=generator), torch.randn(400, 5, generator=generator)
        >>> index = CurIndex(users[:50] @ films.T)
        >>> found = index.search(lambda items: films[items] @ users[55], k=3, budget=20)
        >>> found.calls, found.items.equal((films @ users[55]).topk(3).indices)
        (20, True)
    """

    def __init__(
        self,
        anchor_scores: Tensor,
        *,
        first: float = 0.2,
        rounds: int = 5,
        method: Method = "pivoted-qr",
        noise: float | None = None,
        seed: int = 0,
    ) -> None:
        scores = anchor_scores if isinstance(anchor_scores, Tensor) else torch.as_tensor(anchor_scores)
        if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 1 or not scores.is_floating_point():
            raise DataError(
                f"expected the scores of two or more anchor queries with the items, a floating-point matrix (queries, "
                f"items); found {scores.dtype} {tuple(scores.shape)}"
            )
        if not scores.isfinite().all():
            query, item = (~scores.isfinite()).nonzero()[0].tolist()
            raise DataError(f"the score of anchor query {query} with item {item} is {scores[query, item]}")
        if not 0.0 < first <= 1.0:
            raise ConfigError(f"first is a part of the budget, in (0, 1]; found {first}")
        rounds = whole_number(rounds, None, "rounds")
        seeded(seed)  # or an error that says what a seed is
        if noise is not None and not (math.isfinite(noise) and noise >= 0.0):
            raise ConfigError(f"noise must be zero or positive, found {noise}")
        if isinstance(method, str) and method not in RULES:
            raise ConfigError(f"unknown method {method!r}{suggest(method, RULES)}")
        # Plain numbers, which a file can hold whatever kind was given.
        self.first, self.rounds, self.method, self.seed = float(first), rounds, method, int(seed)
        # Exact scores are compared in this precision too: in half of it, items would tie.
        self._set(scores.detach().to(torch.promote_types(scores.dtype, torch.float32)))
        self.noise = self._fit_noise() if noise is None else float(noise)

    def _set(self, scores: Tensor) -> None:
        self.anchor_scores = scores
        self.mean = scores.mean(dim=0)
        self._centred = (scores - self.mean) / math.sqrt(len(scores) - 1)
        self._skeletons: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.anchor_scores.shape[1]

    def __repr__(self) -> str:
        q, n = self.anchor_scores.shape
        settings = f"first={self.first:g}, rounds={self.rounds}, noise={self.noise:.3g}"
        return f"CurIndex({n} items, {q} anchor queries, {settings})"

    def search(
        self, scorer: Callable[[Tensor], Any], k: int = 10, budget: int = 50, *, proposed: Tensor | None = None
    ) -> SearchResult:
        """The best k items of one query.

        Args:
            scorer: Exact scores of the items whose numbers (m,) int64 it is given, (m,).
            k: How many are wanted.
            budget: Exact scores that may be asked for; of all items if there are fewer.
            proposed: Items (p,) int64 that a cheaper search holds for good, say a bi-encoder, best first; they are
                scored in the place of the skeleton, as many as its part of the budget.

        Raises:
            ConfigError: k is not in 1 .. budget, or proposed items do not exist or come twice.
            DataError: The scorer gives another number of scores, or ones that are not finite.
        """
        budget = min(whole_number(budget, None, "budget"), len(self))
        k = whole_number(k, budget, "k", ", the scores that may be asked for")
        start = max(1, round(self.first * budget))
        scored = self.skeleton(start) if proposed is None else self._checked(proposed)[:start]
        exact = _exact(scorer(scored), scored, self.mean)
        predicted = self.predict(scored, exact)
        for left in range(self.rounds, 0, -1):
            more = math.ceil((budget - len(scored)) / left)
            if not more:
                break
            candidates = predicted.clone()
            candidates[scored] = -math.inf
            chosen = candidates.topk(more).indices
            exact = torch.cat([exact, _exact(scorer(chosen), chosen, self.mean)])
            scored = torch.cat([scored, chosen])
            predicted = self.predict(scored, exact)
        best = exact.topk(k)
        return SearchResult(scored[best.indices], best.values, scored, predicted)

    def search_all(
        self, scorer: Callable[[Any, Tensor], Any], queries: Iterable[Any], k: int = 10, budget: int = 50
    ) -> list[SearchResult]:
        """:meth:`search` for each of several queries, with a scorer of (query, item numbers)."""
        return [self.search(lambda items, query=query: scorer(query, items), k, budget) for query in queries]

    def _checked(self, given: Any) -> Tensor:
        try:
            items = torch.as_tensor(given, device=self.mean.device)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"expected numbers of items, found {given!r}") from None
        if items.ndim != 1 or not len(items):
            raise ConfigError(f"expected one or more items, found {tuple(items.shape)}")
        if items.is_floating_point() or items.is_complex() or items.dtype == torch.bool:
            raise ConfigError(f"expected numbers of items, whole ones; found {items.dtype}")
        items = items.to(torch.int64)
        if len(items.unique()) < len(items):
            raise ConfigError(f"expected different items, found one twice among {len(items)}")
        if int(items.min()) < 0 or int(items.max()) >= len(self):
            raise ConfigError(
                f"items are numbered 0 to {len(self) - 1}, found {int(items.min())} to {int(items.max())}"
            )
        return items

    def skeleton(self, size: int) -> Tensor:
        """The first items that every query is scored with, (size,) int64; chosen once, at most one per anchor query."""
        size = min(size, *self.anchor_scores.shape)
        if size not in self._skeletons:  # by size: a longer choice of most rules does not begin with the shorter one
            chosen = select_columns(in_float64(self._centred), size, method=self.method, seed=self.seed)
            self._skeletons[size] = chosen.to(self.mean.device)
        return self._skeletons[size]

    def predict(self, items: Tensor, scores: Tensor) -> Tensor:
        """Scores of all items from those of some: exact there, the posterior mean elsewhere, (n,).

        Args:
            items: (m,) int64, different ones.
            scores: (m,) their exact scores.

        Raises:
            ConfigError: An item does not exist or comes twice.
            DataError: There is another number of scores, or they are not finite.
        """
        items = self._checked(items)
        scores = _exact(scores, items, self.mean)
        predicted = _posterior(self.mean, self._centred, items, scores[None], self._lambda(self.noise))[0]
        predicted[items] = scores
        return predicted

    def add_items(self, anchor_scores: Tensor) -> None:
        """Append items, given their scores with the same anchor queries (q, m); the skeleton is chosen anew.

        Raises:
            DataError: The scores have another number of queries, or are not finite.
        """
        new = torch.as_tensor(anchor_scores, device=self.mean.device).to(self.anchor_scores)
        if new.ndim != 2 or len(new) != len(self.anchor_scores) or not new.isfinite().all():
            raise DataError(
                f"expected finite scores of the {len(self.anchor_scores)} anchor queries with new items, "
                f"({len(self.anchor_scores)}, items); found {tuple(new.shape)}"
            )
        self._set(torch.cat([self.anchor_scores, new], dim=1))

    def remove_items(self, items: Sequence[int] | Tensor) -> None:
        """Take items away; those behind them move up. The skeleton is chosen anew.

        Raises:
            ConfigError: There is no such item, one is named twice, or none would be left.
        """
        keep = torch.ones(len(self), dtype=torch.bool, device=self.mean.device)
        keep[self._checked(items)] = False
        if not keep.any():
            raise ConfigError("no item would be left")
        self._set(self.anchor_scores[:, keep])

    def save(self, path: Path | str) -> None:
        """Write the index as one safetensors file. The rule must be one that has a name."""
        if not isinstance(self.method, str):
            raise ConfigError("an index whose selection rule is a function cannot be saved; use a rule by name")
        facts = {"first": self.first, "rounds": self.rounds, "noise": self.noise, "seed": self.seed}
        metadata = {"kind": _KIND, "method": self.method, **{name: repr(value) for name, value in facts.items()}}
        atomic_write(Path(path), save({"anchor_scores": self.anchor_scores.cpu().contiguous()}, metadata))

    @classmethod
    def load(cls, path: Path | str) -> CurIndex:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            if facts.get("kind") != _KIND:
                raise CheckpointError(f"{path} holds something else, expected the index of CurIndex.save")
            return cls(
                load_file(path)["anchor_scores"], first=float(facts["first"]), rounds=int(facts["rounds"]),
                method=facts["method"], noise=float(facts["noise"]), seed=int(facts["seed"]),
            )  # fmt: skip
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole index: {error}") from error

    def _lambda(self, noise: float) -> float:
        """In the scores' own units, never quite zero."""
        variance = float(in_float64(self._centred).square().sum(dim=0).mean())
        return max(noise, 1e-12) * variance

    def _fit_noise(self) -> float:
        """The noise with the least squared error on anchor queries in turn left out of mean and covariance."""
        scores = in_float64(self.anchor_scores)
        q, n = scores.shape
        size = max(1, min(q // 2, n // 2, 30))
        items = torch.randperm(n, generator=seeded(self.seed), device="cpu")[:size].to(scores.device)
        fold = torch.arange(q, device=scores.device) % min(_FOLDS, q)
        errors = torch.zeros(len(_NOISES), dtype=torch.float64, device="cpu")
        for i in range(int(fold.max()) + 1):
            kept, left = scores[fold != i], scores[fold == i]
            if len(kept) < 2:
                return 1e-2
            mean = kept.mean(dim=0)
            centred = (kept - mean) / math.sqrt(len(kept) - 1)
            variance = float(centred.square().sum(dim=0).mean())
            for j, noise in enumerate(_NOISES):
                guess = _posterior(mean, centred, items, left[:, items], max(noise * variance, 1e-300))
                errors[j] += float((guess - left).square().sum())
        return _NOISES[int(errors.argmin())]


def _posterior(mean: Tensor, centred: Tensor, items: Tensor, scores: Tensor, noise: float) -> Tensor:
    """(b, n) from (b, m) exact scores of m items: in queries' space, so that no (n, n) covariance is formed."""
    known = in_float64(centred[:, items])
    gram = known.T @ known
    gram.diagonal().add_(noise)
    # Eigenvalues rather than Cholesky: with little noise and like items the matrix is singular to rounding.
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(max(noise, float(values[-1].clamp_min(0)) * 1e-14, 1e-300))
    weights = ((in_float64(scores) - in_float64(mean[items])) @ vectors / values) @ vectors.T
    return mean + (weights @ known.T).to(centred) @ centred


def _exact(scores: Any, items: Tensor, like: Tensor) -> Tensor:
    try:
        scores = torch.as_tensor(scores, device=like.device).detach().to(like)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"expected the exact scores of {len(items)} items, found {scores!r}") from None
    if scores.shape != items.shape:
        raise DataError(
            f"expected the exact scores of {len(items)} items, ({len(items)},); found {tuple(scores.shape)}"
        )
    if not scores.isfinite().all():
        item = items[~scores.isfinite()][0]
        raise DataError(f"the exact score of item {int(item)} is not finite")
    return scores
