"""What a step did, and why: plain functions of a model and its optimizer, to be called every N steps.

Predicted loss change of a step (post kexue.fm/archives/10657), g the gradient and u the update, W <- W - lr u:

    dL = -sum lr u.g        exactly what the optimizer did, to first order; beside it what other rules would give:
    gradient descent        -lr ||g||^2
    sign descent            -lr ||g||_1 = -lr sqrt(N) ||g|| cos(sign g, g)
    msign of the gradient   -lr s ||G||_*   (s the shape factor, ||.||_* the sum of singular values)

If the observed change is far above the predicted one, the step is too long for first-order reasoning.

Beside the quantities of :mod:`quintic.optim.measures`: orthogonality residual ||O O' - 1||_F / sqrt(n) of the last
update O = u / s, and from the same singular values the number of matrices on which Newton-Schulz has really run:
implementations exist that silently do not, and the loss still falls.

Everything is computed in float64 from the weights before and after the step, so it holds for what happened, not
for what was meant. :func:`diagnose` costs a copy of the parameters and, for each matrix, three eigenvalue problems
of its shorter side n: some 6 n^2 m + 4 n^3 flops in float64. At width 128 on one CPU core that took as long as four
of Muon's own steps, so every 100 steps is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core import ConfigError
from quintic.optim.lr import scale_factor
from quintic.optim.measures import (
    change,
    layer_shares,
    sign_cosine,
    signal_to_noise,
    singular_values,
    sums,
    svd_entropy,
    wide,
)
from quintic.optim.momentum import gradient_weight
from quintic.optim.routing import roles
from quintic.optim.split import parts_of

__all__ = ["Diagnosis", "MatrixRow", "diagnose", "snapshot"]

_SPECTRA = 8  # matrices whose singular values are recorded
_RANKS = 24  # places in the spectrum at which they are


def snapshot(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Copies of all parameters that have a gradient, for :func:`diagnose`; take it right before the step."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    return {p: p.detach().clone() for p in params if p.grad is not None}


@dataclass(frozen=True)
class MatrixRow:
    """Matrices of one shape in one parameter, and their last update u (W <- W - lr u, without weight decay)."""

    name: str
    """Of the parameter; of part i of a fused one ``name[i]``."""
    matrices: int
    """How many: slices of a stack times blocks of a part."""
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
    weight_spectrum: tuple[float, ...]
    """Singular values of the weights, largest first, mean over the matrices."""
    update_spectrum: tuple[float, ...]
    """Of u; NaN if the rate was 0."""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found."""

    metrics: dict[str, float]
    """Numbers of the whole model, for a line of metrics."""
    layers: dict[str, float]
    """Share of the squared gradient norm per layer."""
    matrices: tuple[MatrixRow, ...]
    spectra: dict[str, dict[str, list[int] | list[float | None]]]
    """For some matrices, evenly chosen: ``shape``, and ``weight`` and ``update``, the singular values at the places
    ``rank`` (1 is the largest) of the spectrum, about equally far apart on a logarithmic scale. Fit for JSON: what is
    not finite is None."""


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
        orthogonality_residual (median over parameters), muon_matrices, orthogonalized_matrices; cap_factor with a
        loss-change cap, by which rates are then multiplied.

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
    cap = float(getattr(optimizer, "cap_factor", 1.0))
    rates = {p: cap * float(group["lr"]) for p, group in groups.items()}
    predicted = descent = sign = 0.0
    for p, g in gradients.items():
        one, two, _ = sums(g)
        predicted += change(p, before[p], g) / clip_scale
        descent -= rates[p] * two / clip_scale**2
        sign -= rates[p] * one / clip_scale

    reading = {row.name: (row.layout, row.split, row.orientation) for row in roles(model)}
    rows = []
    for p, g in gradients.items():
        group, state = groups[p], optimizer.state.get(p, {})
        layout, split, orientation = reading[names[p]]
        if group.get("algorithm") == "muon":
            layout, split, orientation = group["layout"] or "stack", group["split"], group["orientation"]
        if layout not in ("stack", "conv") or not p.numel():
            continue
        momentum, beta, steps = _momentum(group, state)
        tensors = [p, before[p], g] if momentum is None else [p, before[p], g, momentum]
        views = [parts_of(t, layout, split, orientation) for t in tensors]
        for i, (new, old, gradient, *rest) in enumerate(zip(*views, strict=True)):
            ratio = math.nan
            if rest and 0 < beta < 1:
                size, noise = (math.sqrt(sums(part.tensor)[1]) for part in (rest[0], gradient))
                ratio = signal_to_noise(size, noise, beta, steps)
            name = names[p] if len(views[0]) == 1 else f"{names[p]}[{i}]"
            W, W_old, G = (wide(part.tensor).reshape(part[1:]) for part in (new, old, gradient))
            rows.append(_matrix_row(name, W, W_old, G, group, rates[p], clip_scale, ratio))

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
    if getattr(optimizer, "cap", None) is not None:
        metrics["cap_factor"] = cap
    if observed_change is not None:
        metrics["observed_change"] = observed_change
    shares = layer_shares({names[p]: g for p, g in gradients.items()})
    return Diagnosis(metrics, shares, tuple(rows), _spectra(rows))


def _momentum(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Tensor | None, float, int | None]:
    """Average of gradients of a parameter, its decay rate, and how many went into it if few may have."""
    if "momentum_buffer" in state and "dampening" not in group:  # torch.optim.SGD's buffer is a sum, not an average
        beta = group.get("momentum", 0.0)
        weight = gradient_weight(group.get("momentum_form", "average"), beta)
        return state["momentum_buffer"] * ((1.0 - beta) / weight), beta, None
    if "exp_avg" in state:
        return state["exp_avg"], group["adamw_betas" if "adamw_betas" in group else "betas"][0], int(state["step"])
    return None, 0.0, None


def _matrix_row(
    name: str,
    new: Tensor,
    old: Tensor,
    gradient: Tensor,
    group: Mapping[str, Any],
    lr: float,
    clip_scale: float,
    ratio: float,
) -> MatrixRow:
    """The row of (matrices, n, m) weights, in float64, after and before the step."""
    count, n, m = new.shape
    weights = singular_values(new)
    updates = torch.full_like(weights, math.nan)
    update_rms = residual = msign_change = math.nan
    orthogonalized = 0
    muon = group.get("algorithm") == "muon"
    if lr > 0:
        decay = lr * group.get("weight_decay", 0.0)
        # If nothing has moved, the step was skipped and there was no decay either.
        update = torch.zeros_like(old) if torch.equal(old, new) else (old * (1.0 - decay) - new) / lr
        update_rms = update.square().mean().sqrt().item()
        updates = singular_values(update)
    if muon:
        factor = scale_factor(group["scale"], n, m)
        msign_change = -lr * factor * singular_values(gradient).sum().item() / clip_scale
        if lr > 0:
            energy = updates.square()
            total = energy.sum(-1, keepdim=True)
            if group["scale"] == "rms":  # its factor depends on the rank: measure it
                unit = (updates * energy).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
                factor = torch.where(unit > 0, unit, 1.0)
            sigma = updates / factor
            residual = (sigma.square() - 1.0).square().mean(-1).sqrt().max().item()
            # After Newton-Schulz singular values are near 1, or near 0 where the gradient has none. Energy tells:
            # in a plain gradient nearly all of it is in a few values of any size.
            near = torch.where((sigma > 0.5) & (sigma < 1.5), energy, 0.0).sum(-1)
            orthogonalized = int((near > 0.9 * total[..., 0]).sum())
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
        predicted_change=((new - old) * gradient).sum().item() / clip_scale,
        msign_change=msign_change,
        residual=residual,
        orthogonalized=orthogonalized,
        weight_spectrum=tuple(weights.mean(0).tolist()),
        update_spectrum=tuple(updates.mean(0).tolist()),
    )


def _spectra(rows: Sequence[MatrixRow]) -> dict[str, dict[str, list[int] | list[float | None]]]:
    last = len(rows) - 1
    chosen = [rows[i] for i in sorted({round(k * last / (_SPECTRA - 1)) for k in range(_SPECTRA)})] if rows else []
    found = {}
    for row in chosen:
        length = len(row.weight_spectrum)
        places = sorted({round(length ** (k / (_RANKS - 1))) for k in range(_RANKS)})
        values = {
            key: [spectrum[i - 1] if math.isfinite(spectrum[i - 1]) else None for i in places]
            for key, spectrum in (("weight", row.weight_spectrum), ("update", row.update_spectrum))
        }
        found[row.name] = {"shape": list(row.shape), "rank": places, **values}
    return found


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if weights else math.nan


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64, device="cpu").nanmedian().item() if values else math.nan
