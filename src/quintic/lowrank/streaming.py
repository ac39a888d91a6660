"""One pass over rows that come once: columns, rows and the coefficients between them from two sketches.

While the rows go by, two thin products are kept, of l = 2 k + 10 vectors each, and nothing of A itself:

    Y = Omega A  (l, n)        W = A Psi  (m, l)

Columns J are chosen on Y, rows I on W. The coefficients come from the sketches too: Z = Y[:, J]^+ Y for a column
decomposition, X = W W[I, :]^+ for a row decomposition, U = (Omega C)^+ (Omega A Psi) (R Psi)^+ for CUR. Ten more
vectors of each sketch take no part in that and measure the errors. With l = k + 10 the errors would be twice as large.

The columns and rows themselves are looked up afterwards: :meth:`OnePass.gather`. Omega is a pure function of the seed
and the position of a row, so that the size of the blocks does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintic.core import DataError
from quintic.core.counter_rng import Stream
from quintic.linalg.sketch import OVERSAMPLING, gaussian
from quintic.lowrank.least_squares import apply_inverse
from quintic.lowrank.result import whole_number
from quintic.lowrank.row_blocks import RowBlocks
from quintic.lowrank.selection import Method, choose, method_name
from quintic.lowrank.skeleton import Skeleton
from quintic.lowrank.source import Dense, as_source

__all__ = ["OnePass", "read_once"]

_PROBES = 10


@dataclass(frozen=True, eq=False, repr=False)
class OnePass:
    """What one pass tells about a matrix; numpy arrays, errors relative in the Frobenius norm and estimated."""

    shape: tuple[int, int]
    cols: Any
    """(k,): the chosen columns J."""
    rows: Any
    """(k,): the chosen rows I."""
    Z: Any
    """(k, n) with A ~ A[:, J] Z."""
    X: Any
    """(m, k) with A ~ X A[I, :]."""
    column_error: float
    """Of A ~ A[:, J] Z."""
    row_error: float
    """Of A ~ X A[I, :]."""
    error: float
    """Of A ~ C U R."""
    method: str
    before: Any
    """(k, k) T_1^-1 (Q_1' Omega A Psi Q_2), with C before after R the CUR decomposition."""
    after: Any
    """(k, k) T_2'^-1."""

    def __repr__(self) -> str:
        m, n = self.shape
        errors = f"{self.error:.3g}, of its columns {self.column_error:.3g}, of its rows {self.row_error:.3g}"
        return f"OnePass({m} x {n}, rank {len(self.cols)}, relative error about {errors}, method '{self.method}')"

    @property
    def U(self) -> Any:
        """(k, k) with A ~ C U R; see :meth:`gather` for factors that are better conditioned."""
        return self.before @ self.after

    def gather(self, A: Any) -> Skeleton:
        """The CUR decomposition, with columns and rows looked up in the data: a second pass.

        A third pass gives the best core, by ``cur(A, columns=once.cols, rows=once.rows)``.
        """
        source = as_source(A)
        if source.shape != self.shape:
            raise DataError(f"the rows that were read had shape {self.shape}, this matrix has {source.shape}")
        C, R = source.columns(source.into(self.cols)), source.rows(source.into(self.rows))
        return Skeleton(
            left=source.out(C @ source.into(self.before)),
            right=source.out(source.into(self.after) @ R),
            method=self.method,
            source=source,
            cols=self.cols,
            rows=self.rows,
            C=source.out(C),
            R=source.out(R),
            core="sketched",
        )


def read_once(
    blocks: np.ndarray | Iterable[Any] | Callable[[], Iterable[Any]],
    rank: int,
    *,
    method: Method = "quality",
    seed: int = 0,
) -> OnePass:
    """Read rows once, in blocks (b, n), and decompose the matrix they make.

    Args:
        blocks: Any iterator or iterable of arrays or tensors; see :class:`quintic.lowrank.RowBlocks`.
        rank: k, 1 to min(m, n).
        method: Selection rule, applied to the sketches.
        seed: Of the sketches and the rule.

    Raises:
        ConfigError: The rank is unusable.
        DataError: There are no rows, they do not fit together, or one has an element that is not finite.

    Example:
        >>> A = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0))
        >>> once = read_once(iter([A[:3], A[3:]]), rank=1)
        >>> bool(np.allclose(A[:, once.cols] @ once.Z, A)), bool(np.allclose(once.gather(A).reconstruct(), A))
        (True, True)
    """
    rank = whole_number(rank, None, "rank")
    rows = blocks if isinstance(blocks, RowBlocks) else RowBlocks(iter(blocks) if isinstance(blocks, list) else blocks)
    size = 2 * rank + OVERSAMPLING
    sketch = _Sketch(size + _PROBES, seed)
    for block in rows:
        sketch.add(block)
    Y, W, M = sketch.finish()
    shape = (W.shape[0], Y.shape[1])
    whole_number(rank, min(shape), "rank", f" for a matrix of {shape[0]} x {shape[1]}")
    Y, Y_probe = Y[:size], Y[size:]
    W, W_probe = W[:, :size], W[:, size:]
    M, M_probe = M[:size, :size], M[size:, size:]

    J = choose(Dense(Y), rank, method, seed)
    I_rows = choose(Dense(W.mH), rank, method, seed)
    Q1, T1 = torch.linalg.qr(Y[:, J])
    Q2, T2 = torch.linalg.qr(W[I_rows].mH)
    Z = apply_inverse(T1, Q1.mH @ Y)
    X = apply_inverse(T2, Q2.mH @ W.mH).mH
    before = apply_inverse(T1, Q1.mH @ M @ Q2)
    after = apply_inverse(T2, torch.eye(rank, dtype=T2.dtype, device=T2.device), adjoint=True)
    return OnePass(
        shape=shape,
        cols=J.numpy(force=True),
        rows=I_rows.numpy(force=True),
        Z=Z.numpy(force=True),
        X=X.numpy(force=True),
        column_error=_ratio(Y_probe - Y_probe[:, J] @ Z, Y_probe),
        row_error=_ratio(W_probe - X @ W_probe[I_rows], W_probe),
        error=_ratio(M_probe - Y_probe[:, J] @ before @ after @ W_probe[I_rows], M_probe),
        method=method_name(method),
        before=before.numpy(force=True),
        after=after.numpy(force=True),
    )


class _Sketch:
    """Y = Omega A, W = A Psi and M = Omega A Psi of the rows so far."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.omega = Stream(seed, "rows of a single pass")
        self.rows = 0
        self.Y: Tensor | None = None
        self.W: list[Tensor] = []
        self.M: Tensor | None = None

    def add(self, block: Tensor) -> None:
        count = block.shape[0]
        parts = 2 if block.is_complex() else 1
        words = self.omega.normal(self.rows * self.size * parts, count * self.size * parts)
        omega = torch.from_numpy(words.reshape(count, self.size * parts))
        if parts == 2:
            omega = torch.view_as_complex(omega.reshape(count, self.size, 2)) * 0.5**0.5
        omega = omega.to(block)
        if self.Y is None or self.M is None:
            self.psi = gaussian(block.shape[1], self.size, self.seed, block)
            self.Y = block.new_zeros(self.size, block.shape[1])
            self.M = block.new_zeros(self.size, self.size)
        W = block @ self.psi
        self.Y += omega.mH @ block
        self.M += omega.mH @ W
        self.W.append(W)
        self.rows += count

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.Y is None or self.M is None or not self.rows:
            raise DataError("there were no rows to read")
        return self.Y, torch.cat(self.W), self.M


def _ratio(off: Tensor, whole: Tensor) -> float:
    size = torch.linalg.vector_norm(whole)
    return float(torch.linalg.vector_norm(off) / size) if size > 0 else 0.0
