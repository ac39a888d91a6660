"""Top-k by few exact scores: against the exact answer, plain CUR, kriging by hand, and bad input."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quintic.core import CheckpointError, ConfigError, DataError
from quintic.lowrank import CurIndex, select_columns


def scores(queries=80, items=400, rank=6, noise=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(queries, rank, generator=g, dtype=torch.float64)
    right = torch.randn(rank, items, generator=g, dtype=torch.float64)
    return left @ right + noise * torch.randn(queries, items, generator=g, dtype=torch.float64)


def recall(index, truth, k, budget):
    found = [index.search(lambda items, row=row: row[items], k, budget) for row in truth]
    pairs = zip(found, truth, strict=True)
    return sum(len(set(f.items.tolist()) & set(row.topk(k).indices.tolist())) for f, row in pairs) / (k * len(truth))


def test_a_low_rank_matrix_is_answered_exactly_with_as_many_calls_as_its_rank_plus_k():
    S = scores()
    index = CurIndex(S[:60], first=0.5, noise=0.0)
    for row in S[60:]:
        found = index.search(lambda items, row=row: row[items], k=8, budget=16)
        assert found.items.equal(row.topk(8).indices) and found.calls == 16
        assert torch.allclose(found.predicted, row, atol=1e-6)


def test_prediction_is_the_posterior_mean_of_a_gaussian():
    """Against the formula with the whole covariance."""
    S, noise = scores(40, 30, noise=0.5), 0.1
    R, row, J = S[:30], S[35], torch.tensor([3, 17, 5, 29])
    index = CurIndex(R, noise=noise)
    C = torch.cov(R.T)
    lam = noise * C.diagonal().mean()
    expected = R.mean(0) + C[:, J] @ torch.linalg.solve(C[J][:, J] + lam * torch.eye(4), row[J] - R.mean(0)[J])
    expected[J] = row[J]
    assert torch.allclose(index.predict(J, row[J]), expected, atol=1e-10)


def test_no_dip_where_items_asked_for_are_as_many_as_anchor_queries():
    """Plain CUR, s_J R_J^+ R, is useless there; the fitted noise keeps recall growing with the budget."""
    S = scores(60, 300, rank=10, noise=1.5, seed=1)
    R, truth = S[:30], S[30:]
    J = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:30]

    def error(guess):
        return float((guess - truth).square().mean())

    plain = error(truth[:, J] @ torch.linalg.pinv(R[:, J]) @ R)
    index = CurIndex(R)
    ours = error(torch.stack([index.predict(J, row[J]) for row in truth]))
    assert plain > 3 * ours and ours < error(R.mean(0).expand_as(truth))
    by_budget = [recall(index, truth, 10, budget) for budget in (12, 20, 30, 40, 60)]
    assert all(b > a + 0.05 for a, b in pairwise(by_budget)), by_budget
    assert by_budget[2] > recall(CurIndex(R, noise=0.0), truth, 10, 30) + 0.1


def test_rounds_find_more_than_one_and_a_skeleton_more_than_nothing():
    S = scores(150, 800, rank=20, noise=0.5, seed=2)
    R, truth = S[:100], S[100:]
    one, many = (recall(CurIndex(R, rounds=rounds), truth, 10, 50) for rounds in (1, 5))
    assert many > one > 50 / 800 * 3


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 60), st.data())
def test_the_answer_is_the_best_of_what_was_scored(queries, items, data):
    budget = data.draw(st.integers(1, 80))
    k = data.draw(st.integers(1, min(budget, items)))
    rounds, first = data.draw(st.integers(1, 9)), data.draw(st.floats(0.01, 1.0))
    S = scores(queries + 1, items, rank=3, noise=1.0, seed=data.draw(st.integers(0, 99)))
    row, asked = S[-1], []

    def scorer(numbers):
        asked.extend(numbers.tolist())
        return row[numbers]

    index = CurIndex(S[:-1].to(data.draw(st.sampled_from([torch.float32, torch.float64]))), first=first, rounds=rounds)
    found = index.search(scorer, k, budget)
    assert found.scored.tolist() == asked and len(set(asked)) == len(asked) == found.calls == min(budget, items)
    expected = sorted(asked, key=lambda i: -row[i])[:k]
    assert found.items.tolist() == expected and torch.allclose(found.scores.double(), row[found.items], rtol=1e-6)
    assert found.predicted.isfinite().all()
    if budget >= items:
        assert found.items.tolist() == row.topk(k).indices.tolist()


def test_same_seed_same_answer_and_files_come_back(tmp_path):
    S = scores(50, 90, noise=0.3).float()
    index = CurIndex(S[:40], method="k-means", seed=3)
    index.save(tmp_path / "index.safetensors")
    again = CurIndex.load(tmp_path / "index.safetensors")
    assert repr(again) == repr(index) and "90 items, 40 anchor queries" in repr(index)
    a, b = (i.search(lambda items: S[45][items], 5, 20) for i in (index, again))
    assert a.scored.equal(b.scored) and a.predicted.equal(b.predicted)


@pytest.mark.parametrize("method", ["pivoted-qr", "quality", "k-means"])
def test_an_answer_does_not_depend_on_earlier_ones(method):
    """A longer skeleton that was asked for before is not the shorter one with more behind it."""
    S = scores(60, 200, noise=0.5)
    used, fresh = (CurIndex(S[:50], method=method, noise=0.1) for _ in range(2))
    used.search(lambda items: S[50][items], 5, 150)
    a, b = (index.search(lambda items: S[51][items], 5, 40) for index in (used, fresh))
    assert a.scored.equal(b.scored) and a.predicted.equal(b.predicted)


@pytest.mark.parametrize("method", ["pivoted-qr", "norms-top", "uniform"])
def test_the_skeleton_is_chosen_by_the_rule_that_was_asked_for(method):
    S = scores(30, 80, noise=0.5)
    index = CurIndex(S, method=method, noise=0.1, seed=4)
    assert index.skeleton(7).equal(select_columns(S - S.mean(0), 7, method=method, seed=4))


def test_exact_scores_keep_their_precision_and_no_graph():
    """From anchor scores of half precision, where these would all be one number, and from a network in training."""
    S = scores(40, 60).half()
    row = (5.0 + torch.arange(60.0) * 1e-4).requires_grad_()
    found = CurIndex(S).search(lambda items: row[items], 3, 60)
    assert found.items.tolist() == [59, 58, 57] and found.scores.equal(row.detach()[[59, 58, 57]])
    assert not found.scores.requires_grad and not found.predicted.requires_grad


def test_items_come_and_go():
    S = scores(60, 100)
    whole, index = CurIndex(S[:50], noise=1e-3), CurIndex(S[:50, :70], noise=1e-3)
    index.add_items(S[:50, 70:])
    ask = lambda items: S[55][items]  # noqa: E731
    assert len(index) == 100 and index.search(ask).scored.equal(whole.search(ask).scored)
    index.remove_items(range(70, 100))
    assert len(index) == 70 and index.search(ask).scored.equal(CurIndex(S[:50, :70], noise=1e-3).search(ask).scored)


def test_proposed_items_take_the_place_of_the_skeleton():
    """Of a cheap search that is mostly right: together better than either."""
    S = scores(150, 800, rank=20, noise=0.5, seed=2)
    index, truth = CurIndex(S[:100], first=0.5), S[100:]
    cheap = truth + 2.0 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=truth.dtype)

    def share(asked):
        return sum(
            len(set(a.tolist()) & set(row.topk(10).indices.tolist())) for a, row in zip(asked, truth, strict=True)
        )

    both = [
        index.search(lambda items, r=row: r[items], proposed=c.topk(99).indices)
        for row, c in zip(truth, cheap, strict=True)
    ]
    assert all(f.scored[:25].equal(c.topk(99).indices[:25]) and f.calls == 50 for f, c in zip(both, cheap, strict=True))
    alone = [index.search(lambda items, r=row: r[items]).scored for row in truth]
    assert share([f.scored for f in both]) > max(share(alone), share([c.topk(50).indices for c in cheap]))


def test_several_queries():
    S = scores(60, 100)
    index = CurIndex(S[:50])
    found = index.search_all(lambda query, items: S[query][items], [52, 57], k=4, budget=30)
    assert [f.items.tolist() for f in found] == [S[q].topk(4).indices.tolist() for q in (52, 57)]


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(1, 5), torch.ones(4, 0), torch.ones(3, 3, dtype=torch.int64)]
)
def test_scores_of_a_wrong_form(bad):
    with pytest.raises(DataError, match="two or more anchor queries"):
        CurIndex(bad)


def test_bad_numbers_are_named():
    S = scores(20, 30)
    broken = S.clone()
    broken[3, 7] = math.nan
    with pytest.raises(DataError, match="query 3 with item 7 is nan"):
        CurIndex(broken)
    index = CurIndex(S)
    with pytest.raises(ConfigError, match="k = 11; expected 1 to 10"):
        index.search(lambda items: S[0][items], k=11, budget=10)
    with pytest.raises(DataError, match="not finite"):
        index.search(lambda items: S[0][items] / 0.0)
    with pytest.raises(DataError, match=r"found \(1,\)"):
        index.search(lambda items: S[0][items][:1], budget=20)
    with pytest.raises(ConfigError, match="first"):
        CurIndex(S, first=0.0)
    with pytest.raises(ConfigError, match="rounds"):
        CurIndex(S, rounds=0)
    for options in ({"rounds": 1.5}, {"seed": None}, {"seed": "x"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} = .*; expected"):
            CurIndex(S, **options)
    for options in ({"k": 1.5}, {"k": 0}, {"budget": 0}, {"budget": 20.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} = .*; expected 1"):
            index.search(lambda items: S[0][items], **options)
    with pytest.raises(DataError, match=r"exact scores of \d+ items, found None"):
        index.search(lambda items: None)
    with pytest.raises(ConfigError, match="noise"):
        CurIndex(S, noise=-1.0)
    with pytest.raises(ConfigError, match="did you mean 'k-means'"):
        CurIndex(S, method="kmeans")
    with pytest.raises(ConfigError, match="numbered 0 to 29"):
        index.remove_items([30])
    with pytest.raises(ConfigError, match="no item would be left"):
        index.remove_items(range(30))
    with pytest.raises(ConfigError, match="different items"):
        index.search(lambda items: S[0][items], proposed=torch.tensor([1, 1]))
    for none in ("ab", [1.5], [True, False], None):
        with pytest.raises(ConfigError, match="numbers of items"):
            index.search(lambda items: S[0][items], proposed=none) if none else index.remove_items(none)
    for none in (S[:5], torch.full((20, 2), math.nan)):
        with pytest.raises(DataError, match="new items"):
            index.add_items(none)
    for items, error, message in (([], ConfigError, "one or more"), ([30], ConfigError, "numbered 0 to 29"),
                                  ([1, 1], ConfigError, "different"), ([1], DataError, "of 1 items")):  # fmt: skip
        with pytest.raises(error, match=message):
            index.predict(torch.tensor(items), torch.zeros(2))


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_scores_that_are_all_alike(value):
    index = CurIndex(torch.full((6, 9), value))
    assert index.search(lambda items: torch.full((len(items),), value), 3, 5).calls == 5


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a whole index"):
        CurIndex.load(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        CurIndex.load(tmp_path / "y.safetensors")
    save_file({"anchor_scores": scores(9, 9)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds something else"):
        CurIndex.load(tmp_path / "other.safetensors")
    CurIndex(scores(9, 9)).save(tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for old, new in ((b"pivoted-qr", b"pivoted-xx"), (b'"first":"0.2"', b'"first":"7.2"')):
        assert old in data
        (tmp_path / "damaged.safetensors").write_bytes(data.replace(old, new))
        with pytest.raises(CheckpointError, match="not a whole index"):
            CurIndex.load(tmp_path / "damaged.safetensors")
    with pytest.raises(ConfigError, match="by name"):
        CurIndex(scores(9, 9), method=lambda A, k, *, seed: torch.arange(k)).save(tmp_path / "z.safetensors")


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    index = CurIndex(scores(9, 9), first=np.float64(0.3), rounds=np.int64(2), noise=np.float32(0.5), seed=np.int64(4))
    index.save(tmp_path / "index.safetensors")
    again = CurIndex.load(tmp_path / "index.safetensors")
    assert (again.first, again.rounds, again.noise, again.seed) == (0.3, 2, 0.5, 4)
