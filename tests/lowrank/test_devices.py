"""Everything lies where the matrix does, whatever the default device; float64 is not asked of a device without it."""

import numpy as np
import pytest
import scipy.sparse
import torch
from tests.devices import NARROW, meta_by_default, without_float64
from tests.lowrank.matrices import ByProducts, randn
from torch import nn

from quintic.lowrank import (
    RULES,
    CurIndex,
    KernelMatrix,
    RowBlocks,
    compress,
    cr,
    cur,
    interpolative,
    load_compressed,
    nystrom,
    nystrom_attention,
    read_once,
    svd,
)

A = randn(24, 20)
PSD = A @ A.T
Q = randn(1, 12, 4, dtype=torch.float32)
LARGE = randn(70, 60)
INPUTS = randn(40, 6, dtype=torch.float32)
WEIGHTS = randn(176, seed=3, dtype=torch.float32).split([60, 10, 80, 8, 16, 2])


def gauss(X, Y):
    return torch.exp(-torch.cdist(X, Y).square())


def decomposed(given):
    """Left factors and errors of everything that takes a matrix of any kind."""
    found = [interpolative(given, 3), interpolative(given, 3, side="rows"), cur(given, 3), cur(given, 3, core="cross")]
    found += [svd(given, 3), interpolative(given, tol=0.9), cur(given, columns=[1, 2], rows=[0, 5])]
    return [part for each in found for part in (each.left, each.right, each.error())]


def shrunk(method, layer):
    with torch.device("cpu"):
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    for p, values in zip(net.parameters(), WEIGHTS, strict=True):
        p.data.copy_(values.view(p.shape))
    found = compress(net, [INPUTS], keep=0.5, method=method, layers=layer)
    again = load_compressed(net, found.module.state_dict())
    return [*found.module.parameters(), *again.parameters(), found.layers[0].error]


def retrieved():
    index = CurIndex(A @ A.T)
    found = index.search(lambda items: (A @ A[3])[items].tolist(), k=3, budget=8)
    return [found.items, found.scores, index.noise]


CASES = {
    **{rule: lambda rule=rule: [interpolative(A, 3, method=rule).left] for rule in RULES},
    "large": lambda: [svd(LARGE, 2).left, *decomposed(torch.cat([A, A]).repeat(1, 4))],
    "tensor": lambda: decomposed(A),
    "array": lambda: decomposed(A.numpy()),
    "sparse": lambda: decomposed(scipy.sparse.csr_array(np.where(A.numpy() > 0, A.numpy(), 0.0))),
    "operator": lambda: decomposed(ByProducts(A)),
    "row blocks": lambda: decomposed(RowBlocks([A[:9], A[9:]])),
    "one pass": lambda: [read_once(iter([A[:9], A[9:]]), 3).error, read_once([A], 3).gather(A).left],
    "nystrom": lambda: [nystrom(PSD, 3).left, nystrom(PSD, tol=0.5).error()],
    "kernel": lambda: [nystrom(KernelMatrix(gauss, A), 3).features(A[:2])],
    "product": lambda: [cr(A, A.T, 3, method=m, middle="full").left for m in ("top", "sampled", "tuples")],
    "attention": lambda: [nystrom_attention(Q, Q, Q, 4), nystrom_attention(Q, Q, Q, 4, mask=Q[..., 0] < 1)],
    "retrieval": retrieved,
    "neurons": lambda: shrunk("neurons", None),
    "factors": lambda: shrunk("svd", ["2"]),
    "pruned": lambda: shrunk("magnitude", ["2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_default_device_does_not_matter(name):
    expected = CASES[name]()
    with meta_by_default():
        found = CASES[name]()
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(torch.as_tensor(each).detach(), torch.as_tensor(other).detach())


@pytest.mark.parametrize(
    "made",
    [
        lambda x: nystrom_attention(x, x, x, 4),
        lambda x: nystrom_attention(x, x, x, 4, mask=x[..., 0] < 1),
        lambda x: RULES["norms-sampled"](x[0], 3),
        lambda x: RULES["k-means"](x[0], 3),
        lambda x: cr(x[0], x[0].T, 3, method="sampled"),
        lambda x: CurIndex(x[0], noise=0.1).skeleton(3),
    ],
)
def test_float64_is_not_asked_of_a_device_without_it(made, monkeypatch):
    with without_float64(monkeypatch):
        made(torch.empty(1, 12, 4, device=NARROW))


def test_blocks_without_rows_are_passed_over():
    parts = [A[:0], A[:9], A[9:9], A[9:]]
    whole = cur(RowBlocks([A]), rank=3)
    assert np.array_equal(cur(RowBlocks(parts), rank=3).left, whole.left)
    assert read_once(parts, 3).error == read_once([A[:9], A[9:]], 3).error
