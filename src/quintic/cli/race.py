"""``quintic race``: several optimizers or balancers on the same data, each tuned, compared at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.printing import say
from quintic.cli.wiring import build_settings, build_task, kind_of, split_arguments
from quintic.core import ConfigError
from quintic.core.files import atomic_write, check_folder, check_name

if TYPE_CHECKING:
    from quintic.cli.origin import Origin
    from quintic.engine.race import Arm, Finish, Race

__all__ = ["race"]

DEFAULT_ARMS = ("muon: optim.name=muon", "adamw: optim.name=adamw")


def race(
    *arguments: str | Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    arm: list[str] | None = None,
    lr: list[float] | None = None,
    seeds: int = 3,
    task: str = "lm",
    size: str = "tiny",
    start: Annotated[Path | None, Parameter(name="--from")] = None,
    match: bool = True,
) -> None:
    """Compare optimizers or other settings fairly: each with its own best learning rate, over several seeds.

    Losses are those at the end of the schedule. A race that was stopped continues with the same command.

    Parameters
    ----------
    arguments
        Files, folders and settings for all arms, as for train.
    out
        Folder of the race; every run is a run folder in it.
    arm
        What is compared, as "NAME: section.field=value ..."; repeat for each. Default: muon against adamw.
    lr
        Learning rates to begin with, repeat for each; the grid grows by factors of 2 until the best lies inside it.
        Default: 0.004 0.008 0.016.
    seeds
        Seeds, and so runs, at the best rate of each arm.
    task
        What to train: lm, tarflow or ddpm.
    size
        Preset, as for train.
    start
        Fine-tune in every run: start from the weights, shape and tokenizer of this run or exported folder.
    match
        Also measure how many steps the winner needs for the losses of the others.

    Examples
    --------
    quintic race book.txt --out runs/race
    quintic race other.txt --from runs/book --out runs/tuning --lr 0.001
    quintic race --task ddpm --out runs/images --lr 0.002 --lr 0.004 --seeds 2
    quintic race --out runs/r --arm "one: lm.top_k=1" --arm "two: lm.top_k=2"
    """
    from quintic.cli.origin import open_origin
    from quintic.engine.race import run_race
    from quintic.report.race import write_race_report

    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, found {seeds}")
    if any(not rate > 0 for rate in lr or ()):
        raise ConfigError(f"--lr must be above 0, found {' '.join(f'{rate:g}' for rate in lr or ())}")
    console = Console()
    paths, overrides = split_arguments(arguments)
    arms = [_parse_arm(text) for text in arm or DEFAULT_ARMS]
    if len({a.name for a in arms}) < len(arms):
        raise ConfigError(f"two arms have one name: {', '.join(a.name for a in arms)}")
    for each in arms:  # a typing mistake in the last arm must not show after an hour
        build_settings(task, size, [*overrides, *each.overrides])
    if (out / "config.toml").exists():
        raise ConfigError(f"{out} holds a single run, not a race; choose another --out")
    check_folder(out)
    check_name(out)
    origin = None if start is None else open_origin(start, task)

    result = run_race(
        lambda *run: _run_one(console, _Course(out, task, size, paths, overrides, origin), *run),
        arms,
        start_lrs=lr or [0.004, 0.008, 0.016],
        seeds=range(seeds),
        match=match,
        note=lambda text: say(text, console=console),
    )
    atomic_write(out / "race.json", json.dumps({"task": task, **result.to_json()}, indent=1))
    _print_table(console, result)
    say(f"report: {write_race_report(out)}", console=console)


def _parse_arm(text: str) -> Arm:
    from quintic.engine.race import Arm

    name, colon, words = text.partition(":")
    if not colon or not name.strip().replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f'arm {text!r} is not of the form "NAME: section.field=value ..."')
    paths, overrides = split_arguments(words.split())
    if paths:
        raise ConfigError(f"arm {name!r} may hold settings only, found {paths[0]}")
    return Arm(name.strip(), tuple(overrides))


class _Course(NamedTuple):
    """What all runs of a race have in common."""

    out: Path
    task: str
    size: str
    paths: list[Path]
    overrides: list[str]
    origin: Origin | None

    def header(self, fingerprint: str) -> dict[str, object]:
        """Top-level keys of the configuration of a run."""
        paths = [str(path.absolute()) for path in self.paths]
        start = {} if self.origin is None else {"from": str(self.origin.folder.absolute())}
        return {"task": self.task, "size": self.size, "paths": paths, "fingerprint": fingerprint, **start}


def _run_one(console: Console, course: _Course, arm: Arm, lr: float, seed: int, fraction: float) -> Finish:
    """Train one run of the race, continue it, or find it finished."""
    from quintic.engine import Run
    from quintic.engine.checkpoint import check_fit
    from quintic.engine.loop import TrainingError, train
    from quintic.engine.metrics import read_metrics
    from quintic.engine.race import Finish

    task, origin = course.task, course.origin
    overrides = [*course.overrides, *arm.overrides, f"optim.lr={lr}", f"engine.seed={seed}"]
    settings = build_settings(task, course.size, overrides)
    if origin is not None:
        settings = origin.settings(task, settings)
    made, settings, _ = build_task(task, course.paths, settings)
    whole = settings["engine"].steps
    steps = max(1, round(whole * fraction))  # few steps round two fractions to one run: its words follow the steps
    settings = settings.derive("engine.steps", steps, f"{steps / whole:g} of the schedule")
    header = course.header(made.fingerprint)
    folder = course.out / f"{arm.name}-lr{lr:g}-seed{seed}-steps{steps}"
    if (folder / "config.toml").exists():
        run = Run.open(folder)
        if run.header()["fingerprint"] != made.fingerprint:
            raise ConfigError(f"{folder} was trained on other data; choose another --out for this race")
        if run.settings_text() != settings.to_toml(header):
            raise ConfigError(f"{folder} was trained with other settings; choose another --out for this race")
    else:
        if origin is not None:
            shapes = {name: tensor.shape for name, tensor in origin.weights.items()}
            check_fit(shapes, kind_of(task).build(task, settings), str(origin.folder))
        run = Run.create(folder, settings, header, None if origin is None else origin.weights)
    quiet = Console(quiet=True)
    with console.status(folder.name):
        try:
            outcome = train(made, settings, run, quiet, quiet_peak=True)
        except TrainingError:
            return Finish(float("inf"), 0.0, steps)
    if not outcome.finished:
        raise KeyboardInterrupt
    row = read_metrics(run.metrics_file)[-1]  # rounded there: a continued race sees the same numbers
    if "val_loss" not in row:
        raise ConfigError("a race compares validation losses: keep data.validation_fraction above 0")
    loss = row["val_loss"]  # null stands for one that is not finite
    return Finish(float("inf") if loss is None else loss, row["seconds"], steps)


def _print_table(console: Console, result: Race) -> None:
    from quintic.report.words import by_seed, finite

    table = Table("arm", "best lr", "interior", "validation loss", "ms a step", box=None, pad_edge=False)
    for arm in result.arms:
        table.add_row(
            arm.name,
            f"{arm.best_lr:g}",
            "yes" if arm.interior else "no",
            arm.told,
            finite(1000 * arm.seconds_per_step, 1),
        )
    console.print(table)
    for match in result.matches:
        say(
            f"{match['winner']} reaches the loss of {match['against']} in {match['step_ratio']:.2f} of its "
            f"steps{by_seed(match['step_ratios'])} and {match['time_ratio']:.2f} of its time",
            console=console,
        )
