"""One training run as a value, a book that remembers runs, and what a study says about them.

A :class:`Run` holds everything that decides its outcome, so its outcome can be kept: a study that is stopped goes on,
and studies that share a run train it once. Runs are compared at the end of their schedules, over seeds, in pairs: a
seed fixes the initial weights and every batch.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpt import GPT, VALIDATION, text, windows
from quintic.core.counter_rng import Stream
from quintic.engine.race import Arm, Finish, Race, run_race
from quintic.optim import OptimConfig, build_optimizer, lr_factor, roles
from quintic.optim.measures import sign_cosine, singular_values, svd_entropy

FOLDER = Path("runs") / "benchmarks" / "studies"
"""Kept, so that a study that was stopped goes on; delete it to measure again."""
SEEDS = (0, 1, 2)
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_EVAL_CHARACTERS = 4096  # of one batch of a validation
_LATE = 0.8  # gradients are described from this part of a run on, where the loss hardly moves


@dataclass(frozen=True)
class Run:
    """One training run. The defaults are the small size of the studies."""

    layers: int = 3
    width: int = 64
    heads: int = 2
    context: int = 64
    batch: int = 16
    steps: int = 500
    seed: int = 0
    optim: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``OptimConfig`` that differ from the studies' own: linear decay to 0 after a tenth of warm-up."""
    matrix_lr: float = 1.0
    """Factor on the rate of matrices under Muon, their decay per step unchanged: it scales the update's RMS."""
    matrix_decay: str = "as set"
    """Of matrices under Muon: as set in ``optim``, none, or post: post 10648's own form of spectral decay, with an
    all-ones start and ten iterations in every step."""
    text: str = "moby"
    characters: int = 0
    """Train on the first so many only; 0 is all."""
    track: int = 0
    """Validate and take spectra every so many steps."""
    held_out: int = VALIDATION
    """Characters that are validated on."""
    start: Run | None = None
    """Begin with the weights that this run ends with."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    loss: float
    """Nats a character on text kept out of training; infinite if training diverged."""
    seconds: float
    """Time in training steps."""
    parameters: int
    grad_norm: float
    """Median over the last fifth, before clipping."""
    cosine: float
    """Mean of cos(sign g, g) over the last fifth."""
    clipped: float
    """Share of the steps whose gradient was clipped."""
    entropies: dict[str, list[float]]
    """SVD entropy of every matrix, by parameter."""
    curve: dict[str, list[float]]
    """If tracked: step, training loss, validation loss, mean log sigma_1 of the matrices and their SVD entropy."""


BASE = {
    "schedule": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.9, "decay_shape": "linear", "weight_decay": 0.1,
    "adamw_beta2": 0.95,
}  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, on which small models are quickest and runs the same on any machine of a kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(run: Run, weights: dict[str, Tensor] | None = None) -> tuple[Outcome, GPT]:
    """Train a run, from ``weights`` if given."""
    config = OptimConfig(**{**BASE, **run.optim})
    ids = text(run.text)
    training, held_out = ids[:-VALIDATION], ids[-VALIDATION:][: run.held_out]
    training = training[: run.characters or len(training)]
    model = GPT(run.layers, run.width, run.heads, run.context, run.seed)
    if weights is not None:
        model.load_state_dict(weights)
    optimizer = build_optimizer(model, config)
    matrices = _matrices(model)
    clipping = config.make_clipping()
    stream = Stream(run.seed, "windows")
    starts = stream.integers(0, run.steps * run.batch, len(training) - run.context).reshape(run.steps, run.batch)
    norms, cosines, seconds = [], [], 0.0
    curve: dict[str, list[float]] = {name: [] for name in ("step", "train", "validation", "log_sigma", "entropy")}
    recent: list[float] = []
    for step in range(run.steps):
        began = time.perf_counter()
        lr = config.lr * lr_factor(step, run.steps, config)
        for group in optimizer.param_groups:
            of_muon = group["algorithm"] == "muon"
            group["lr"] = lr * (run.matrix_lr if of_muon else 1.0)
            if of_muon:
                group["weight_decay"] = config.weight_decay / run.matrix_lr if run.matrix_decay == "as set" else 0.0
        loss = model.loss(windows(training, starts[step], run.context))
        optimizer.zero_grad()
        loss.backward()
        norm = float(clipping(model).norm)
        if not math.isfinite(norm):
            return _failed(model), model
        if run.matrix_decay == "post":
            for p, shape in matrices.values():
                _post_decay(p, shape, lr * config.weight_decay)
        optimizer.step()
        seconds += time.perf_counter() - began
        norms.append(norm)
        recent.append(loss.item())
        if step >= _LATE * run.steps and (step + 1) % 5 == 0:
            cosines.append(sign_cosine(p.grad for p in model.parameters() if p.grad is not None))
        if run.track and ((step + 1) % run.track == 0 or step == 0):
            spectra = [singular_values(p.detach().view(shape)) for p, shape in matrices.values()]
            curve["step"].append(step + 1)
            curve["train"].append(statistics.fmean(recent))
            curve["validation"].append(evaluate(model, held_out, run.context))
            curve["log_sigma"].append(float(torch.cat([s[:, 0] for s in spectra]).log().mean()))
            curve["entropy"].append(float(torch.cat([svd_entropy(s) for s in spectra]).mean()))
            recent = []
    end = evaluate(model, held_out, run.context)
    if not math.isfinite(end):
        return _failed(model), model
    late = norms[int(_LATE * run.steps) :]
    outcome = Outcome(
        loss=end,
        seconds=seconds,
        parameters=sum(p.numel() for p in model.parameters()),
        grad_norm=statistics.median(late),
        cosine=statistics.fmean(cosines) if cosines else math.nan,
        clipped=sum(norm > config.clip_norm for norm in norms) / len(norms),
        entropies={
            name: [round(h, 5) for h in svd_entropy(singular_values(p.detach().view(shape))).tolist()]
            for name, (p, shape) in matrices.items()
        },
        curve={name: [round(v, 5) for v in values] for name, values in curve.items() if values},
    )
    return outcome, model


def _failed(model: GPT) -> Outcome:
    return Outcome(math.inf, math.nan, sum(p.numel() for p in model.parameters()), math.nan, math.nan, math.nan, {}, {})


def _matrices(model: GPT) -> dict[str, tuple[Tensor, tuple[int, int, int]]]:
    """{name: (parameter, (matrices, outputs, inputs))} of what Muon takes."""
    parameters = dict(model.named_parameters())
    return {
        row.name: (parameters[row.name], row.parts[0][:3])  # this model's splits have one part
        for row in roles(model)
        if row.parts
    }


@torch.no_grad()
def _post_decay(p: Tensor, shape: tuple[int, int, int], amount: float) -> None:
    """W <- W - amount W v v', v by ten power iterations from the all-ones vector."""
    W = p.view(shape)
    v = W.new_ones(shape[0], shape[2], 1)
    for _ in range(10):
        v = W.mT @ (W @ v)
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    W.sub_((W @ v) @ (amount * v.mT))


@torch.no_grad()
def evaluate(model: GPT, ids: Tensor, context: int) -> float:
    """Mean nats a character over consecutive windows."""
    starts = np.arange(0, len(ids) - context, context)
    size = max(1, _EVAL_CHARACTERS // context)
    losses = [float(model.loss(windows(ids, part, context))) * len(part)
              for part in np.array_split(starts, math.ceil(len(starts) / size))]  # fmt: skip
    return sum(losses) / len(starts)


@one_thread()
def step_seconds(runs: Mapping[str, Run], rounds: int = 30, steps: int = 3) -> dict[str, float]:
    """Median seconds a step, in turns within one process, so that whatever else runs hits all alike."""

    def endless(run: Run) -> Iterator[float]:
        config = OptimConfig(**{**BASE, **run.optim})
        model = GPT(run.layers, run.width, run.heads, run.context, run.seed)
        optimizer, clipping = build_optimizer(model, config), config.make_clipping()
        ids = text(run.text)
        starts = np.arange(run.batch) * 1000
        while True:
            began = time.perf_counter()
            loss = model.loss(windows(ids, starts, run.context))
            optimizer.zero_grad()
            loss.backward()
            clipping(model)
            optimizer.step()
            yield time.perf_counter() - began

    loops = {name: endless(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, loop in loops.items():
            taken = [next(loop) for _ in range(steps)]
            if turn:  # the first one warms up
                times[name] += taken
    return {name: statistics.median(taken) for name, taken in times.items()}


class Book:
    """Outcomes by run, one JSON line each in a file of this book; a run that is in no book yet is trained."""

    def __init__(self, name: str, folder: Path = FOLDER, note: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self.note = note
        self._known: dict[str, Outcome] = {}
        self._models: dict[str, dict[str, Tensor]] = {}
        for path in folder.glob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._known[_key(entry["run"])] = Outcome(**entry["outcome"])

    def __call__(self, run: Run) -> Outcome:
        facts = _facts(asdict(run))
        key = _key(facts)
        if key not in self._known:
            outcome, _ = train(run, None if run.start is None else self._weights(run.start))
            self._known[key] = outcome
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": facts, "outcome": asdict(outcome)}) + "\n")
            self.note(f"{outcome.loss:.4f} {outcome.seconds:.1f} s  {key}")
        return self._known[key]

    def _weights(self, run: Run) -> dict[str, Tensor]:
        """Final weights, trained again where they are not at hand: runs are exact."""
        key = _key(_facts(asdict(run)))
        if key not in self._models:
            outcome, model = train(run, None if run.start is None else self._weights(run.start))
            self._models[key] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.note(f"{outcome.loss:.4f} {outcome.seconds:.1f} s  (start) {key}")
        return self._models[key]


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults: equal runs are equal however they are written, also after a new field."""
    default, optim = asdict(Run()), {**asdict(OptimConfig()), **BASE}
    facts = {name: value for name, value in run.items() if value != default[name]}
    facts["optim"] = {name: value for name, value in run.get("optim", {}).items() if value != optim[name]}
    return facts if run.get("start") is None else {**facts, "start": _facts(run["start"])}


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(_facts(run), sort_keys=True)


def race(
    book: Book,
    base: Run,
    arms: Mapping[str, Mapping[str, Any]],
    start_lrs: Sequence[float],
    seeds: Sequence[int] = SEEDS,
    match: bool = False,
) -> Race:
    """``quintic race``'s protocol: rates swept by factors of 2 until the best is interior, seeds at the best.

    Args:
        book: Trains or remembers.
        base: What the arms share.
        arms: {name: fields of :class:`Run` that differ; ``optim`` is merged into the base's}.
        start_lrs: Where the grids begin.
        seeds: The first one tunes.
        match: Measure the winner's shorter schedules against the others.
    """

    def run_one(arm: Arm, lr: float, seed: int, fraction: float) -> Finish:
        run = arm_run(base, arms[arm.name], lr, seed, fraction)
        outcome = book(run)
        return Finish(outcome.loss, outcome.seconds, run.steps)

    return run_race(
        run_one, [Arm(name, ()) for name in arms], start_lrs=start_lrs, seeds=seeds, match=match, note=book.note
    )


def arm_run(base: Run, arm: Mapping[str, Any], lr: float, seed: int, fraction: float = 1.0) -> Run:
    """The run of an arm at a rate and a seed."""
    optim = {**base.optim, **arm.get("optim", {}), "lr": lr}
    return replace(base, **{**arm, "optim": optim, "seed": seed, "steps": round(base.steps * fraction)})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation and half width of the 95 % t-interval of the mean.

    Example:
        >>> {k: round(v, 3) for k, v in spread([1.0, 2.0, 3.0]).items()}
        {'mean': 2.0, 'sd': 1.0, 'half': 2.484, 'n': 3}
    """
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return {"mean": mean, "sd": math.nan, "half": math.nan, "n": n}
    with np.errstate(invalid="ignore"):  # a run that diverged
        sd = float(np.std(values, ddof=1))
    return {"mean": mean, "sd": sd, "half": _T.get(n - 1, 1.96) * sd / math.sqrt(n), "n": n}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """:func:`spread` of a - b, seed by seed."""
    return spread([x - y for x, y in zip(a, b, strict=True)])


def plus_minus(found: Mapping[str, float], digits: int = 3) -> str:
    """Mean and interval in words.

    Example:
        >>> plus_minus({"mean": 0.5, "half": 0.02})
        '0.500 ± 0.020'
    """
    return f"{found['mean']:.{digits}f} ± {found['half']:.{digits}f}"
