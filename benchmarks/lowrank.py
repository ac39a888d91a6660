"""Columns and rows: how near to the best approximation, how fast, how well tolerances are kept, and at which size.

Errors are divided by the least error of any approximation of the rank (from the SVD). Timings are taken in turns within
one process, one thread each (also in the BLAS of scipy, which keeps its own count); scipy.linalg.interpolative knows
float64 only and is slow, so that it runs once.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import Claim, table
from benchmarks.plot import Line, draw, image
from quintic.lowrank import RowBlocks, cur, interpolative, nystrom, select_columns, svd

SHOWN = ("quality", "fast", "pivoted-qr", "deim", "greedy-error", "k-means", "leverage-top", "norms-top", "uniform")
BARS = {
    "digits, k = 10": 1.20,
    "digits, k = 20": 1.26,
    "digits, k = 30": 1.28,
    "Hilbert 800, k = 10": 1.15,
    "Kahan 300, k = 50": 1.15,
    "30 outlying columns, k = 20": 1.05,
}
"""Largest ratio of the quality rule to the best approximation."""
HAAR_BAR = 1.05
"""Largest ratio of the quality rule to pivoted QR where singular vectors are random."""
TRIALS = 1000
SIZES = (1000, 2000, 4000, 8000)
BIG = (4000, 600, 200)
"""Size, rank of the matrix, rank asked for."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(m: int, n: int, values: np.ndarray, seed: int = 0) -> Tensor:
    U = torch.linalg.qr(randn(m, len(values), seed=seed)).Q
    V = torch.linalg.qr(randn(n, len(values), seed=seed + 1)).Q
    return U * torch.from_numpy(values) @ V.T


def hilbert(n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def kahan(n: int, theta: float = 1.2) -> Tensor:
    s, c = np.sin(theta), np.cos(theta)
    return torch.from_numpy(np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1)))


def outliers() -> Tensor:
    low, far = randn(500, 20) @ randn(20, 870, seed=1), randn(500, 30, seed=2)
    return torch.cat([low / low.norm(dim=0), 1.3 * far / far.norm(dim=0)], 1)


def snn(m: int = 1000, n: int = 800, heavy: int = 50) -> Tensor:
    rng = np.random.default_rng(0)
    r = min(m, n)
    weight = np.where(np.arange(1, r + 1) <= heavy, 10.0, 1.0) / np.arange(1, r + 1)
    left, right = (rng.random((k, r)) * (rng.random((k, r)) < 0.025) for k in (m, n))
    return torch.from_numpy((left * weight) @ right.T)


def cases() -> dict[str, tuple[Tensor, int]]:
    """Matrices and ranks by name; the digits if scikit-learn is installed (``pip install quintic[bench]``)."""
    found: dict[str, tuple[Tensor, int]] = {}
    with contextlib.suppress(ImportError):
        from sklearn.datasets import load_digits

        digits = torch.from_numpy(load_digits().data.T)
        found |= {f"digits, k = {k}": (digits, k) for k in (10, 20, 30)}
    power = 1 / np.arange(1, 801)
    return found | {
        "Hilbert 800, k = 10": (hilbert(800), 10),
        "Kahan 300, k = 50": (kahan(300), 50),
        "30 outlying columns, k = 20": (outliers(), 20),
        "SNN 1000 x 800, k = 50": (snn(), 50),
        "Haar, 1/j, k = 50": (with_spectrum(1000, 800, power), 50),
        "Haar, 1/j, k = 100": (with_spectrum(1000, 800, power), 100),
        "Haar, 0.95^j, k = 100": (with_spectrum(1000, 800, 0.95 ** np.arange(800)), 100),
    }


def column_error(A: Tensor, at: Tensor) -> float:
    Q = torch.linalg.qr(A[:, at]).Q
    return float(torch.linalg.vector_norm(A - Q @ (Q.mH @ A)))


def quality(matrices: dict[str, tuple[Tensor, int]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, (A, k) in matrices.items():
        best = float(torch.linalg.vector_norm(torch.linalg.svdvals(A)[k:]))
        rows[name] = {rule: column_error(A, select_columns(A, k, method=rule)) / best for rule in SHOWN}
        print(name, {rule: round(v, 3) for rule, v in rows[name].items()}, flush=True)
    return rows


def haar(seeds: int = 10) -> list[float]:
    """The quality rule against pivoted QR on random singular vectors of several sizes and spectra."""
    ratios = []
    for seed in range(seeds):
        for m, n, k, values in ((400, 300, 30, 1 / np.arange(1, 301)), (700, 700, 40, 1 / np.arange(1, 501))):
            A = with_spectrum(m, n, values, seed=2 * seed)
            errors = [
                column_error(A, select_columns(A, k, method=rule, seed=seed)) for rule in ("quality", "pivoted-qr")
            ]
            ratios.append(errors[0] / errors[1])
    return ratios


def in_single_precision() -> dict[str, float]:
    A = hilbert(400).float()

    def error(made: Tensor) -> float:
        return float((A.double() - made.double()).norm() / A.double().norm())

    found = {
        f"{core}, {rule}": cur(A, rank=30, core=core, method=rule)
        for core in ("projection", "cross")
        for rule in ("quality", "fast")
    }
    errors = {name: error(each.reconstruct()) for name, each in found.items()}
    C, R = (found["projection, quality"].C, found["projection, quality"].R)
    errors["the formula as written"] = error(C @ (torch.linalg.pinv(C) @ A @ torch.linalg.pinv(R)) @ R)
    return errors


class ByProducts:
    """A matrix that only shows its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.shape, self.dtype = A, tuple(A.shape), A.dtype

    def matmat(self, X: Tensor) -> Tensor:
        return self.A @ X

    def rmatmat(self, X: Tensor) -> Tensor:
        return self.A.mH @ X


def tolerance(trials: int = TRIALS) -> dict[str, float]:
    """Random matrices, spectra and tolerances: how often an error is above, and how large the rank is."""
    above = {"in memory": 0, "operators": 0}
    worst = 0.0
    excess = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        m, n = (int(v) for v in rng.integers(5, 40, 2))
        short = min(m, n)
        spectra = (
            0.3 ** np.arange(short),
            0.8 ** np.arange(short),
            1 / np.arange(1, short + 1),
            np.arange(1.0, short + 1) ** -3,
        )
        A = with_spectrum(m, n, spectra[trial % 4], seed=trial)
        tol = float(10 ** rng.uniform(-8, -0.3))
        decompose = (interpolative, cur)[trial // 4 % 2]
        method = ("quality", "fast", "pivoted-qr")[trial % 3]
        found = decompose(A, tol=tol, method=method, seed=trial)
        true = float((A - found.reconstruct()).norm() / A.norm())
        above["in memory"] += true > tol + 1e-15
        smallest = next(
            k for k in range(1, found.rank + 1) if decompose(A, rank=k, method=method, seed=trial).error() <= tol
        )
        worst = max(worst, found.rank / smallest)
        excess = max(excess, found.rank - smallest)
        if trial % 4 == 0:
            by_products = decompose(ByProducts(A), tol=tol, method=method, seed=trial)
            above["operators"] += float((A - by_products.reconstruct()).norm() / A.norm()) > tol
    return {"trials": trials, "operator_trials": (trials + 3) // 4, "above": above["in memory"],
            "operators_above": above["operators"], "worst_rank_ratio": worst, "worst_rank_excess": excess}  # fmt: skip


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def against_scipy(size: int, rank: int, k: int, rounds: int = 3) -> dict[str, dict[str, float]]:
    import scipy.linalg.interpolative as peer
    from threadpoolctl import threadpool_limits

    values = 1 / np.arange(1, rank + 1)
    A = with_spectrum(size, size, values)
    best = float(np.linalg.norm(values[k:]))
    B = A.float()
    actions = {
        "fast, float64": lambda: interpolative(A, k, method="fast"),
        "fast, float32": lambda: interpolative(B, k, method="fast"),
        "quality, float64": lambda: interpolative(A, k),
        "quality, float32": lambda: interpolative(B, k),
        "svd, float64": lambda: svd(A, k),
        "one pass, float64": A.norm,
    }
    rows = {}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(timed(action))
    array = A.numpy()
    with threadpool_limits(1):
        began = time.perf_counter()
        order, proj = peer.interp_decomp(array, k)
        rows["scipy, float64"] = {"seconds": time.perf_counter() - began, "threads": 1}
    made = torch.from_numpy(peer.reconstruct_matrix_from_id(array[:, order[:k]], order, proj))
    rows["scipy, float64"]["ratio"] = float((A - made).norm()) / best
    for name, action in actions.items():
        rows[name] = {"seconds": statistics.median(seconds[name])}
        if name != "one pass, float64":
            rows[name]["ratio"] = float((A - action().reconstruct().double()).norm()) / best
    return rows


def against_size(sizes: tuple[int, ...] = SIZES, k: int = 50) -> list[dict[str, float]]:
    """Seconds of decompositions of n x n matrices; both CUR by the fast rule, the second from blocks of 1024 rows."""
    rows = []
    for size in sizes:
        A = (randn(size, k, seed=size) @ randn(k, size, seed=size + 1)).float()
        A += 0.1 * torch.randn(size, size, generator=torch.Generator().manual_seed(size))
        actions = {
            "quality": lambda A=A: interpolative(A, k),
            "fast": lambda A=A: interpolative(A, k, method="fast"),
            "CUR": lambda A=A: cur(A, k, method="fast"),
            "CUR, blocks": lambda A=A: cur(RowBlocks(A.numpy(), height=1024), k, method="fast"),
            "SVD": lambda A=A: svd(A, k),
            "one pass": A.norm,
        }
        rows.append({"size": size} | {name: min(timed(action) for _ in range(2)) for name, action in actions.items()})
        print(rows[-1], flush=True)
    return rows


def kernel() -> dict[str, float]:
    """Relative errors of Nystrom approximations of a kernel of 1000 points, k = 50; of ten uniform draws the mean."""
    x = randn(1000, 6)
    A = torch.exp(-torch.cdist(x, x).square() / 12)
    uniform = [nystrom(A, 50, method="uniform", seed=s).error() for s in range(10)]
    return {"quality": nystrom(A, 50).error(), "fast": nystrom(A, 50, method="fast").error(),
            "uniform": statistics.mean(uniform), "least": svd(A, 50).error()}  # fmt: skip


def run(
    matrices: dict[str, tuple[Tensor, int]] | None = None,
    trials: int = TRIALS,
    big: tuple[int, int, int] = BIG,
    sizes: tuple[int, ...] = SIZES,
    haar_seeds: int = 10,
) -> dict:
    from quintic.core.machine import describe, pick_device, pick_dtype

    device = pick_device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "machine": describe(device, pick_dtype("float32", device)),
            "quality": quality(matrices or cases()),
            "haar": haar(haar_seeds),
            "single": in_single_precision(),
            "kernel": kernel(),
            "tolerance": tolerance(trials),
            "big": list(big),
            "times": against_scipy(*big),
            "sizes": against_size(sizes),
        }
    finally:
        torch.set_num_threads(threads)


def section(result: dict) -> str:
    m, tol, times = result["machine"], result["tolerance"], result["times"]
    size, of, k = result["big"]
    peer = times["scipy, float64"]
    threads = "one thread" if peer["threads"] == 1 else f"one thread, but {peer['threads']:.0f} for scipy"
    ratios = table(
        ["matrix", *SHOWN, "bar of quality"],
        [
            [name, *(f"{row[rule]:.3g}" for rule in SHOWN), f"{BARS[name]:.2f}" if name in BARS else ""]
            for name, row in result["quality"].items()
        ],
    )
    speed = table(
        ["", "seconds", "scipy / it", "error / least error"],
        [
            [
                name,
                f"{row['seconds']:.3g}",
                f"{peer['seconds'] / row['seconds']:.1f}",
                f"{row['ratio']:.3f}" if "ratio" in row else "",
            ]
            for name, row in times.items()
        ],
    )
    single = table(["CUR of the Hilbert matrix 400, k = 30, float32", "relative error"],
                   [[name, f"{error:.1e}"] for name, error in result["single"].items()])  # fmt: skip
    kernels = ", ".join(f"{name} {error:.3g}" for name, error in result["kernel"].items())
    return "\n".join([
        "## Columns and rows",
        "",
        "`python -m benchmarks lowrank`: Frobenius error of the best matrix in the span of the chosen columns, "
        "divided by the least error of any matrix of that rank.",
        "",
        ratios,
        "",
        f"On {len(result['haar'])} matrices with random singular vectors the quality rule has "
        f"{min(result['haar']):.3f} to {max(result['haar']):.3f} times the error of pivoted QR (bar: {HAAR_BAR}).",
        "",
        f"Interpolative decomposition of a {size} x {size} matrix of rank {of}, singular values 1/j, k = {k}; "
        f"{threads}. Machine: {m['cpu']}, torch {m['torch']}.",
        "",
        speed,
        "",
        single,
        "",
        f"Tolerances: {tol['above']} of {tol['trials']} random trials in memory and {tol['operators_above']} of "
        f"{tol['operator_trials']} by products alone end above the tolerance. The rank is at most "
        f"{tol['worst_rank_ratio']:.2f} times the smallest one with which the same rule keeps it "
        f"(at most {tol['worst_rank_excess']} more).",
        "",
        f"Nystrom approximation of a Gaussian kernel of 1000 points, k = 50, relative errors by landmarks: {kernels}.",
        "",
        image("lowrank-size", "Seconds against size"),
    ])  # fmt: skip


def claims(result: dict) -> list[Claim]:
    """One row for each rule by which the post chooses columns, then the bars of this package."""
    near = 2.0
    sources = {
        "pivoted-qr": "posts 10501 and 10662", "norms-top": "posts 10427 and 10662", "k-means": "post 10662",
        "leverage-top": "post 10662", "uniform": "post 10662", "greedy-error": "post 10662", "deim": "post 10662",
    }  # fmt: skip
    made = []
    for rule in SHOWN:
        ratios = {case: row[rule] for case, row in result["quality"].items()}
        over = sum(ratio > near for ratio in ratios.values())
        worst = max(ratios, key=lambda case: ratios[case])
        made.append(Claim(
            f"Columns by {rule}: the error is at most {near:g} times the least of that rank",
            sources.get(rule, "ours"),
            f"median {statistics.median(ratios.values()):.2f} times; worst {ratios[worst]:.3g} ({worst})", 0,
            "yes" if not over else f"no: not on {over} of {len(ratios)} matrices", "lowrank",
        ))  # fmt: skip
    missed = [case for case, bar in BARS.items() if result["quality"][case]["quality"] > bar]
    times, single, kept = result["times"], result["single"], result["tolerance"]
    fast = [times["scipy, float64"]["seconds"] / times[f"fast, {kind}"]["seconds"] for kind in ("float64", "float32")]
    dearer = max(times[f"fast, {kind}"]["ratio"] for kind in ("float64", "float32")) / times["scipy, float64"]["ratio"]
    off = max(single[middle] for middle in single if middle != "the formula as written")
    broken = kept["above"] + kept["operators_above"]
    rows = [
        ("The quality rule stays below its bars on digits, Hilbert, Kahan and outlying columns", "ours",
         f"on {len(BARS) - len(missed)} of {len(BARS)} matrices", not missed),
        ("The quality rule is within 1.05 of pivoted QR where singular vectors are random", "ours",
         f"{max(result['haar']):.3f} times at worst", max(result["haar"]) <= HAAR_BAR),
        ("An interpolative decomposition is 8 times as fast as scipy's, 12 times in float32, at 1.08 of its error",
         "scipy.linalg.interpolative", f"{fast[0]:.1f} and {fast[1]:.1f} times, at {dearer:.3f} of its error",
         fast[0] >= 8 and fast[1] >= 12 and dearer <= 1.08),
        ("CUR in float32 keeps five digits of an ill-conditioned matrix; the formula as written does not", "post 10662",
         f"{off:.1e}; as written {single['the formula as written']:.1e}",
         off <= 1e-5 < single["the formula as written"]),
        ("A tolerance is kept, with at most 1.2 times the smallest rank that keeps it", "ours",
         f"{broken} of {kept['trials'] + kept['operator_trials']} above it, rank {kept['worst_rank_ratio']:.2f} times",
         not broken and kept["worst_rank_ratio"] <= 1.2),
    ]  # fmt: skip
    return made + [Claim(text, source, measured, 0, "yes" if ok else "no", "lowrank")
                   for text, source, measured, ok in rows]  # fmt: skip


def plots(result: dict) -> dict[str, str]:
    rows = result["sizes"]
    names = [name for name in rows[0] if name != "size"]
    lines = [Line(name, [row["size"] for row in rows], [row[name] for row in rows]) for name in names]
    title = "Seconds against size, k = 50, float32, one thread; CUR by the fast rule"
    return {"lowrank-size": draw(title, lines, x="n of an n x n matrix", y="seconds", log_x=True, log_y=True)}
