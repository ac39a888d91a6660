"""What a step did, and why: plain functions of a model and its optimizer, to be called every N steps.

Predicted loss change of a step (post kexue.fm/archives/10657), g the gradient and u the update, W <- W - lr u:

    dL = -sum lr u.g        exactly what the optimizer did, to first order; beside it what other rules would give:
    gradient descent        -lr ||g||^2
    sign descent            -lr ||g||_1 = -lr sqrt(N) ||g|| cos(sign g, g)
    msign of the gradient   -lr s ||G||_*   (s the shape factor, ||.||_* the sum of singular values)

If the observed change is far above the predicted one, the step is too long for first-order reasoning.

Other quantities: SVD entropy H = -(1 / log n) sum p log p with p = sigma^2 / sum sigma^2 (Moonlight, arXiv 2502.16982);
signal to noise |mu|^2 / |sigma|^2 of the gradient from ||m|| / ||g|| (post 11267); orthogonality residual
||O O' - 1||_F / sqrt(n) of the last update O = u / s, and from the same singular values the number of matrices on
which Newton-Schulz has really run: implementations exist that silently do not, and the loss still falls.

Everything is computed in float64 from the weights before and after the step, so it holds for what happened, not
for what was meant. :func:`diagnose` costs a copy of the parameters and, for each matrix, three eigenvalue problems
of its shorter side n: some 6 n^2 m + 4 n^3 flops in float64. At width 128 on one CPU core that took as long as four
of Muon's own steps, so every 100 steps is cheap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core import ConfigError
from quintic.optim.lr import scale_factor
from quintic.optim.routing import matrix_shape, roles

__all__ = [
    "Diagnosis",
    "MatrixRow",
    "diagnose",
    "layer_shares",
    "sign_cosine",
    "signal_to_noise",
    "singular_values",
    "snapshot",
    "svd_entropy",
]

_LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.")  # up to the first numbered module: blocks.3.attention.q.weight -> blocks.3
_CHUNK = 2**20  # elements converted to float64 at a time


@torch.no_grad()
def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of (..., n, m), largest first: (..., min(n, m)) in float64; NaN for what is not finite.

    Square roots of the eigenvalues of the smaller Gram matrix: many times faster than an SVD, and exact to
    about 1e-8 of the largest value.

    Example:
        >>> singular_values(torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    x = _wide(matrices)
    if not x.numel():
        return x.new_zeros(*x.shape[:-2], min(x.shape[-2:]))
    peak = x.abs().amax((-2, -1), keepdim=True)
    finite = peak.isfinite()
    peak = torch.where(finite & (peak > 0), peak, 1.0)
    x = x / peak
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))  # which refuses NaN
    sigma = peak[..., 0] * eigenvalues.flip(-1).clamp_min(0.0).sqrt()
    return torch.where(finite[..., 0], sigma, math.nan)


def svd_entropy(sigma: Tensor) -> Tensor:
    """H = -(1 / log n) sum p log p with p = sigma^2 / sum sigma^2 over the last axis of n singular values.

    1 if all are equal, 0 for rank one and for no matrix at all (zero, or a single singular value).

    Example:
        >>> svd_entropy(torch.tensor([[2.0, 2.0], [2.0, 0.0], [0.0, 0.0]])).round(decimals=6)
        tensor([1., 0., 0.])
    """
    n = sigma.shape[-1]
    if n < 2:
        return sigma.new_zeros(sigma.shape[:-1])
    top = sigma.amax(-1, keepdim=True)
    p = (sigma / torch.where(top > 0, top, 1.0)).square()
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total > 0, total, 1.0)
    return torch.special.entr(p).sum(-1) / math.log(n)


def signal_to_noise(momentum_norm: float, gradient_norm: float, beta: float, steps: int | None = None) -> float:
    """|mu|^2 / |sigma|^2 of gradients with mean mu and spread sigma, from the norms of m and g (post 11267).

    For m <- beta m + (1 - beta) g, E|m|^2 = a |mu|^2 + b |sigma|^2 with a = (1 - beta^t)^2 and
    b = (1 - beta) / (1 + beta) (1 - beta^(2 t)), and E|g|^2 = |mu|^2 + |sigma|^2; the two are solved for the ratio.

    Args:
        momentum_norm: ||m||, average form, without bias correction.
        gradient_norm: ||g|| of the last gradient that went into m.
        beta: Decay rate of m, above 0.
        steps: t, how many gradients m has seen; ``None`` for many.

    Returns:
        The estimate, noisy for few elements; 0 if m is as small as from pure noise, infinite without noise, NaN if
        nothing can be told (zero gradient, or ``steps`` below 2).

    Raises:
        ConfigError: ``beta`` is not in (0, 1).

    Example:
        Adam's update RMS under pure noise is 0.2294 for beta = 0.9, "about 0.2":

        >>> round(signal_to_noise(0.5, 1.0, 0.9), 4), signal_to_noise(0.2294, 1.0, 0.9) < 1e-4
        (0.2632, True)
    """
    if not 0 < beta < 1:
        raise ConfigError(f"beta = {beta}; expected a number between 0 and 1: without momentum there is no estimate")
    t = math.inf if steps is None else steps
    if not gradient_norm > 0 or t < 2:
        return math.nan
    a = (1 - beta**t) ** 2
    b = (1 - beta) / (1 + beta) * (1 - beta ** (2 * t))
    ratio = (momentum_norm / gradient_norm) ** 2
    if ratio >= a:
        return math.inf
    return max(0.0, (ratio - b) / (a - ratio))


@torch.no_grad()
def sign_cosine(gradients: Iterable[Tensor]) -> float:
    """cos(sign g, g) = ||g||_1 / (sqrt(N) ||g||) over all tensors together; N counts the elements that are not 0.

    About 0.8 = sqrt(2 / pi) for Gaussian gradients, less if few elements dominate; NaN if all are 0.

    Example:
        >>> sign_cosine([torch.tensor([5.0, -5.0]), torch.zeros(7)]), sign_cosine([torch.tensor([3.0, 4.0])])
        (1.0, 0.98994...)
    """
    one, two, count = (sum(column) for column in zip(*map(_sums, gradients), (0.0, 0.0, 0), strict=True))
    return one / math.sqrt(count * two) if two > 0 else math.nan


@torch.no_grad()
def layer_shares(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Each layer's share of the squared gradient norm; shares add up to 1.

    A layer is what a name says up to its first number, or else the name of the module.

    Example:
        >>> g = {"embed.weight": torch.tensor([1.0]), "blocks.0.a.weight": torch.tensor([1.0, 1.0]),
        ...      "blocks.0.b.weight": torch.tensor([1.0])}
        >>> layer_shares(g)
        {'embed': 0.25, 'blocks.0': 0.75}
    """
    squares: dict[str, float] = {}
    for name, g in gradients.items():
        match = _LAYER.match(name)
        layer = match[1] if match else name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + _sums(g)[1]
    total = sum(squares.values())
    return {layer: square / total if total else 0.0 for layer, square in squares.items()}


def snapshot(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Copies of all parameters that have a gradient, for :func:`diagnose`; take it right before the step."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    return {p: p.detach().clone() for p in params if p.grad is not None}


@dataclass(frozen=True)
class MatrixRow:
    """One parameter that consists of matrices, and its last update u (W <- W - lr u, without weight decay)."""

    name: str
    matrices: int
    """How many: slices of a stack times blocks of a fused projection."""
    shape: tuple[int, int]
    """Of each: outputs, inputs."""
    muon: bool
    """Whether its group is one of Muon."""
    weight_rms: float
    update_rms: float
    """RMS of u; about 0.2 under Muon with Adam's learning rate. NaN if the rate was 0."""
    spectral_norm: float
    """Largest singular value of the weights, over all matrices."""
    svd_entropy: float
    """Of the weights, mean over the matrices."""
    signal_to_noise: float
    """Of the gradient; NaN without momentum."""
    predicted_change: float
    """-lr u.g, with weight decay."""
    msign_change: float
    """-lr s ||G||_*; NaN if not under Muon."""
    residual: float
    """Orthogonality residual of the update, worst of the matrices; NaN if not under Muon."""
    orthogonalized: int
    """On how many of the matrices Newton-Schulz has really run."""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found."""

    metrics: dict[str, float]
    """Numbers of the whole model, for a line of metrics."""
    layers: dict[str, float]
    """Share of the squared gradient norm per layer."""
    matrices: tuple[MatrixRow, ...]


@torch.no_grad()
def diagnose(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    before: Mapping[Tensor, Tensor],
    *,
    clip_scale: float = 1.0,
    observed_change: float | None = None,
) -> Diagnosis:
    """Diagnose the step that was just taken. Call it after ``optimizer.step()`` and before gradients are cleared.

    Args:
        model: Its roles say which parameters are matrices, see :func:`quintic.optim.roles`.
        optimizer: :class:`quintic.optim.Muon`, or any other with ``lr`` in its groups; weight decay is taken to be
            decoupled, as in AdamW. A matrix counts as "under Muon" if its group says ``algorithm="muon"``.
        before: :func:`snapshot` from before the step.
        clip_scale: By what global clipping multiplied the gradients (``ClipResult.scale``); loss changes are
            those of the gradient before clipping.
        observed_change: Loss of the same batch after the step minus before, if it was measured.

    Returns:
        ``metrics``: predicted_change, observed_change (if given), gradient_descent_change, sign_change,
        matrix_predicted_change and matrix_msign_change (over the matrices under Muon), sign_cosine, weight_rms and
        update_rms (over all matrices), spectral_norm (largest), svd_entropy (mean), signal_to_noise,
        orthogonality_residual (median over parameters), muon_matrices, orthogonalized_matrices.

    Raises:
        ConfigError: The snapshot is of other parameters.

    Example:
        >>> from quintic.optim import Muon
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        >>> optimizer = Muon([model[0].weight, model[2].weight], lr=1e-3, weight_decay=0.0)
        >>> model(torch.randn(64, 8)).square().mean().backward()
        >>> before = snapshot(optimizer)
        >>> optimizer.step()
        >>> found = diagnose(model, optimizer, before)
        >>> found.metrics["predicted_change"] < 0, found.metrics["orthogonalized_matrices"]
        (True, 2)
    """
    names = {p: name for name, p in model.named_parameters()}
    groups = {p: group for group in optimizer.param_groups for p in group["params"] if p in before}
    if len(groups) < len(before) or not names.keys() >= groups.keys():
        raise ConfigError("the snapshot is not of this model and optimizer; take it with snapshot(optimizer)")
    gradients = {p: p.grad for p in groups if p.grad is not None}
    predicted = descent = sign = 0.0
    for p, g in gradients.items():
        lr = float(groups[p]["lr"])
        one, two, _ = _sums(g)
        predicted += _change(p, before[p], g) / clip_scale
        descent -= lr * two / clip_scale**2
        sign -= lr * one / clip_scale

    reading = {row.name: (row.layout, row.row_blocks) for row in roles(model)}
    rows = []
    for p, g in gradients.items():
        group = groups[p]
        layout, blocks = reading[names[p]]
        if group.get("algorithm") == "muon":
            layout, blocks = group["layout"] or "stack", group["row_blocks"]
        if layout is not None and p.numel():
            count, n, m = matrix_shape(tuple(p.shape), layout, blocks)
            rows.append(
                _matrix_row(names[p], (count, n, m), p, before[p], g, group, optimizer.state.get(p, {}), clip_scale)
            )

    muon = [row for row in rows if row.muon]
    sizes = [row.matrices * math.prod(row.shape) for row in rows]
    counts = [row.matrices for row in rows]
    metrics = {
        "predicted_change": predicted,
        "gradient_descent_change": descent,
        "sign_change": sign,
        "matrix_predicted_change": sum(row.predicted_change for row in muon),
        "matrix_msign_change": sum(row.msign_change for row in muon),
        "sign_cosine": sign_cosine(gradients.values()),
        "weight_rms": math.sqrt(_mean([row.weight_rms**2 for row in rows], sizes)),
        "update_rms": math.sqrt(_mean([row.update_rms**2 for row in rows], sizes)),
        "spectral_norm": max((row.spectral_norm for row in rows), default=math.nan),
        "svd_entropy": _mean([row.svd_entropy for row in rows], counts),
        "signal_to_noise": _median([row.signal_to_noise for row in rows]),
        "orthogonality_residual": _median([row.residual for row in muon]),
        "muon_matrices": sum(row.matrices for row in muon),
        "orthogonalized_matrices": sum(row.orthogonalized for row in muon),
    }
    if observed_change is not None:
        metrics["observed_change"] = observed_change
    shares = layer_shares({names[p]: g for p, g in gradients.items()})
    return Diagnosis(metrics, shares, tuple(rows))


def _matrix_row(
    name: str,
    shape: tuple[int, int, int],
    p: Tensor,
    before: Tensor,
    g: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    clip_scale: float,
) -> MatrixRow:
    count, n, m = shape
    lr = float(group["lr"])
    old, new, gradient = _wide(before).reshape(shape), _wide(p).reshape(shape), _wide(g).reshape(shape)
    weights = singular_values(new)
    update_rms = residual = msign_change = math.nan
    orthogonalized = 0
    muon = group.get("algorithm") == "muon"
    update = torch.zeros_like(old)
    if lr > 0:
        decay = lr * group.get("weight_decay", 0.0)
        if not torch.equal(old, new):  # if they are equal, the step was skipped and there was no decay either
            update = (old * (1.0 - decay) - new) / lr
        update_rms = update.square().mean().sqrt().item()
    if muon:
        factor = scale_factor(group["scale"], n, m)
        msign_change = -lr * factor * singular_values(gradient).sum().item() / clip_scale
        if lr > 0:
            sigma = singular_values(update)
            energy = sigma.square()
            total = energy.sum(-1, keepdim=True)
            if group["scale"] == "rms":  # its factor depends on the rank: measure it
                unit = (sigma * energy).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
                factor = torch.where(unit > 0, unit, 1.0)
            sigma = sigma / factor
            residual = (sigma.square() - 1.0).square().mean(-1).sqrt().max().item()
            # After Newton-Schulz singular values are near 1, or near 0 where the gradient has none. Energy tells:
            # in a plain gradient nearly all of it is in a few values of any size.
            near = torch.where((sigma > 0.5) & (sigma < 1.5), energy, 0.0).sum(-1)
            orthogonalized = int((near > 0.9 * total[..., 0]).sum())
    momentum, beta, steps = state.get("momentum_buffer"), group.get("momentum", 0.0), None
    if "dampening" in group:
        momentum = None  # torch.optim.SGD, whose buffer is a sum and not an average
    elif momentum is None and "exp_avg" in state:
        momentum, steps = state["exp_avg"], int(state["step"])
        beta = (group["adamw_betas"] if "adamw_betas" in group else group["betas"])[0]
    ratio = math.nan
    if momentum is not None and 0 < beta < 1:
        ratio = signal_to_noise(math.sqrt(_sums(momentum)[1]), math.sqrt(_sums(g)[1]), beta, steps)
    return MatrixRow(
        name=name,
        matrices=count,
        shape=(n, m),
        muon=muon,
        weight_rms=new.square().mean().sqrt().item(),
        update_rms=update_rms,
        spectral_norm=weights.max().item(),
        svd_entropy=svd_entropy(weights).mean().item(),
        signal_to_noise=ratio,
        predicted_change=_change(p, before, g) / clip_scale,
        msign_change=msign_change,
        residual=residual,
        orthogonalized=orthogonalized,
    )


def _wide(t: Tensor) -> Tensor:
    """In float64, on the CPU for Apple's GPUs, which have none."""
    return (t.cpu() if t.device.type == "mps" else t).detach().double()


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Corresponding elements of tensors of one shape, a bounded number at a time, in float64."""
    flat = [t.detach().reshape(-1).split(_CHUNK) for t in tensors]
    return (tuple(map(_wide, parts)) for parts in zip(*flat, strict=True))


def _sums(t: Tensor) -> tuple[float, float, int]:
    """Sum of magnitudes, sum of squares, number of elements that are not 0."""
    one, two, count = 0.0, 0.0, 0
    for (x,) in _chunks(t):
        one += x.abs().sum().item()
        two += x.square().sum().item()
        count += int(x.count_nonzero())
    return one, two, count


def _change(after: Tensor, before: Tensor, g: Tensor) -> float:
    """(after - before).g"""
    return sum(((a - b) * c).sum().item() for a, b, c in _chunks(after, before, g))


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if weights else math.nan


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).nanmedian().item() if values else math.nan
