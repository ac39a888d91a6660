"""A fair race: same model, data, budget and seeds; every arm tuned until its best rate is interior.

Comparisons of optimizers mislead when one side is tuned better, when curves are read in mid-schedule, or when one seed
speaks for all (Wen et al., arXiv 2509.02046). So an arm is swept over learning rates on a grid of factor 2, which grows
until the best rate is not at its edge; the best rate runs with every seed; the number that counts is the validation
loss at the end of the schedule. How many steps the winner needs for another's loss is measured by running the winner
with shorter schedules, not by reading its curve.

Every run is a run folder of its own, so a race that was stopped goes on where it stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Arm", "ArmResult", "Finish", "Race", "run_race"]

_GROWTH = 4  # factors of two that a grid may grow on each side
_FRACTIONS = tuple(i / 20 for i in range(4, 20))  # shorter schedules tried to match a loss


@dataclass(frozen=True)
class Arm:
    """One side of a race: a name and the settings that make it."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    """The end of one run."""

    loss: float
    """Validation loss at the end of the schedule; infinite if training diverged."""
    seconds: float
    """Time in training steps."""
    steps: int
    """Steps of the schedule."""


@dataclass
class ArmResult:
    """Everything one arm ran."""

    name: str
    overrides: tuple[str, ...]
    sweep: dict[float, float] = field(default_factory=dict)
    """{learning rate: loss} of the first seed."""
    best_lr: float = math.nan
    interior: bool = False
    """Whether worse rates were seen on both sides of the best one."""
    losses: list[float] = field(default_factory=list)
    """Loss per seed at the best rate."""
    seconds_per_step: float = math.nan

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def diverged(self) -> bool:
        """Whether a seed has no finite loss at the best rate; the arm has none then."""
        return not all(map(math.isfinite, self.losses))

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed, nan if one has diverged."""
        if self.diverged:
            return math.nan
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

    @property
    def told(self) -> str:
        """Mean loss and spread in words; one seed has no spread."""
        if self.diverged:
            return "diverged"
        return f"{self.mean:.4f}" + (f" +- {self.spread:.4f}" if len(self.losses) > 1 else "")


@dataclass
class Race:
    """The outcome; arms in the order given."""

    arms: list[ArmResult]
    steps: int
    matches: list[dict[str, Any]] = field(default_factory=list)
    """Per beaten arm with a loss: the share of the steps (also seed by seed), and of the time, that the winner needs
    for its mean loss, and the losses of the shorter schedules."""

    @property
    def winner(self) -> ArmResult:
        """The arm with the lowest mean loss."""
        return min(self.arms, key=lambda arm: arm.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with means and spreads."""
        arms = [asdict(arm) | {"mean": arm.mean, "spread": arm.spread} for arm in self.arms]
        return {"steps": self.steps, "arms": arms, "winner": self.winner.name, "matches": self.matches}


RunOne = Callable[[Arm, float, int, float], Finish]
"""(arm, learning rate, seed, fraction of the steps) -> how it ended."""


def run_race(
    run_one: RunOne,
    arms: Sequence[Arm],
    *,
    start_lrs: Sequence[float],
    seeds: Sequence[int],
    match: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Race:
    """Tune, repeat and compare.

    Args:
        run_one: Trains one run, or finds it finished.
        arms: At least one.
        start_lrs: Learning rates every arm is tried at first.
        seeds: The first one tunes.
        match: Measure the winner's shorter schedules too.
        note: Told what happened, in a line.
    """
    results = []
    steps = 0
    for arm in arms:
        result = ArmResult(arm.name, arm.overrides)
        _sweep(run_one, arm, result, start_lrs, seeds[0], note)
        finishes = [run_one(arm, result.best_lr, seed, 1.0) for seed in seeds]
        result.losses = [finish.loss for finish in finishes]
        paces = [finish.seconds / finish.steps for finish in finishes if math.isfinite(finish.loss)]
        result.seconds_per_step = statistics.median(paces) if paces else math.nan
        steps = finishes[0].steps
        edge = "" if result.interior else " (at the edge of the grid)"
        note(f"{arm.name}: best lr {result.best_lr:g}{edge}, {'' if result.diverged else 'loss '}{result.told}")
        results.append(result)
    race = Race(results, steps)
    if match:
        winner = next(arm for arm in arms if arm.name == race.winner.name)
        for other in race.arms:
            if other.name != winner.name and not other.diverged:  # there is no loss to reach else
                race.matches.append(_match(run_one, winner, race.winner, other, seeds))
    return race


def _sweep(
    run_one: RunOne, arm: Arm, result: ArmResult, start: Sequence[float], seed: int, note: Callable[[str], None]
) -> None:
    waiting = sorted(start)
    grown = 0
    while True:
        for lr in waiting:
            result.sweep[lr] = run_one(arm, lr, seed, 1.0).loss
            note(f"{arm.name}: lr {lr:g} loss {result.sweep[lr]:.4f}")
        tried = sorted(result.sweep)
        result.best_lr = min(tried, key=lambda lr: result.sweep[lr])
        result.interior = tried[0] < result.best_lr < tried[-1]
        if result.interior or grown == _GROWTH:
            return
        waiting = [tried[0] / 2 if result.best_lr == tried[0] else tried[-1] * 2]
        grown += 1


def _match(run_one: RunOne, arm: Arm, winner: ArmResult, other: ArmResult, seeds: Sequence[int]) -> dict[str, Any]:
    """Share of the steps at which the winner reaches the other's mean loss: bisection, then a straight line.

    The same runs give a share for every seed, against the other's loss with that seed.
    """
    runs = {1.0: winner.losses}
    low, high = 0, len(_FRACTIONS)  # the answer is the first index in [low, high) that is good enough, else 1
    while low < high:
        middle = (low + high) // 2
        fraction = _FRACTIONS[middle]
        runs[fraction] = [run_one(arm, winner.best_lr, seed, fraction).loss for seed in seeds]
        if statistics.fmean(runs[fraction]) <= other.mean:
            high = middle
        else:
            low = middle + 1
    share = _crossing({fraction: statistics.fmean(losses) for fraction, losses in runs.items()}, other.mean)
    pace = winner.seconds_per_step / other.seconds_per_step
    return {
        "winner": winner.name,
        "against": other.name,
        "step_ratio": share,
        "step_ratios": [
            _crossing({fraction: losses[i] for fraction, losses in runs.items()}, target)
            for i, target in enumerate(other.losses)
        ],
        "time_ratio": share * pace,
        "losses": {str(fraction): losses for fraction, losses in sorted(runs.items())},
    }


def _crossing(losses: Mapping[float, float], target: float) -> float:
    """Fraction at which the loss falls to the target, on a straight line between runs; nan if it never does.

    Losses over steps bend upwards, so the line lies above them; and if the shortest run is good enough, its fraction
    stands. Both err on the side of more steps.
    """
    enough = min((fraction for fraction, loss in losses.items() if loss <= target), default=math.nan)
    short = max((fraction for fraction in losses if fraction < enough), default=None)
    if short is None or not losses[short] > losses[enough]:
        return enough
    return enough - (enough - short) * (target - losses[enough]) / (losses[short] - losses[enough])
