"""``quintic resume``: go on with a run that was stopped or killed, or train one longer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from quintic.cli.printing import say
from quintic.cli.wiring import split_arguments
from quintic.core import ConfigError, DataError

if TYPE_CHECKING:
    from quintic.engine import Task

__all__ = ["check_data", "data_of", "resume"]


def resume(
    run: Path,
    /,
    *data: str | Path,
    steps: int | None = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    device: str | None = None,
    tracker: str | None = None,
) -> None:
    """Continue a stopped run to its last step, bit for bit as if it had never stopped; or train a run longer.

    Parameters
    ----------
    run
        The run folder.
    data
        Where the data is now, if it was moved; it must be the same.
    steps
        Train to this number of steps in all, more than the run was meant to have: in a new folder, from the last
        checkpoint before the learning rate fell, with the optimizer's state and the place in the data.
    out
        The new folder of --steps. Default: RUN-STEPS.
    device
        Continue on another device than the run's own.
    tracker
        Send the metrics to tensorboard, trackio or wandb too, as for train.

    Examples
    --------
    quintic resume runs/book
    quintic resume runs/book --steps 2000 --out runs/longer
    quintic resume runs/book /new/place/book.txt
    """
    from quintic.cli.train import run_training
    from quintic.cli.wiring import build_task, open_run, refuse_untrained
    from quintic.core.machine import pick_device
    from quintic.engine import Run
    from quintic.engine.checkpoint import list_checkpoints
    from quintic.engine.extension import extend_run
    from quintic.engine.mesh import join_ranks, world_size
    from quintic.engine.metrics import read_metrics
    from quintic.engine.plan import check_batch
    from quintic.engine.sinks import check_sink

    if tracker is not None:
        check_sink(tracker)
    if out is not None and steps is None:
        raise ConfigError(
            "--out is the folder of a longer run: give --steps too. A resume goes on in the run's own folder"
        )
    folder, settings, header = open_run(run)
    refuse_untrained(run, header)
    rows, last = read_metrics(folder.metrics_file), settings["engine"].steps
    finished = steps is None and rows and rows[-1]["step"] >= last and last in list_checkpoints(folder.checkpoints)
    over = f"{run} is finished: all {last} steps are done. Train longer with: quintic resume {run} --steps {2 * last}"
    if finished and not data:
        say(over)
        return
    paths = data_of(run, header, data)
    if device is not None:
        settings = settings.derive("engine.device", device, "given")
    if (shards := settings["engine"].shards) and world_size() % shards:
        settings = settings.derive("engine.shards", 0, f"{shards} do not divide {world_size()}")
    engine = settings["engine"]
    with join_ranks(pick_device(engine.device), engine.shards) as ranks:
        console = Console(quiet=not ranks.is_main)
        if engine.shards != shards:
            words = f"{ranks.world} rank" + "s" * (ranks.world != 1)
            say(f"engine.shards was {shards}, which does not divide {words}: now all share one copy", console=console)
        with ranks.main_first():
            task, settings, _ = build_task(header["task"], paths, settings)
        check_data(run, header, task)
        check_batch(engine.batch_size, ranks.world)
        header["paths"] = [str(path.absolute()) for path in paths]
        if data and steps is None:
            ranks.together(partial(folder.record_paths, header["paths"]) if ranks.is_main else lambda: None)
        if finished:
            say(over, console=console)
            return
        if steps is not None:
            longer = run.with_name(f"{run.absolute().name}-{steps}") if out is None else out
            settings = settings.derive("engine.steps", steps, f"given, after {last} of {run}")
            extend = partial(extend_run, folder, longer, settings, header, last, partial(say, console=console))
            ranks.together(extend if ranks.is_main else lambda: None)
            say(f"run folder: {longer}", console=console)
            folder = Run(longer)
        run_training(console, task, settings, folder, ranks, tracker)


def data_of(run: Path, header: dict[str, Any], given: Sequence[str | Path]) -> list[Path]:
    """Where the data of a run is: where it was, or where a person says that it is now.

    Raises:
        ConfigError: Settings were given.
        DataError: It is not there.
    """
    paths, overrides = split_arguments(given)
    if overrides:
        raise ConfigError(
            "a run keeps its settings, so that a resume is exact; to train its model on with others: "
            f"quintic train DATA --from {run} {' '.join(overrides)}"
        )
    if paths:
        return paths
    paths = [Path(path) for path in header["paths"]]
    if gone := [path for path in paths if not path.exists()]:
        raise DataError(
            f"no such file or folder: {gone[0]}, of which {run} is trained; if it was moved, say where it is: "
            f"quintic resume {run} PATH"
        )
    return paths


def check_data(run: Path, header: dict[str, Any], task: Task) -> None:
    """Make sure that what was read is what a run was begun with.

    Raises:
        DataError: It is not.
    """
    if task.fingerprint != header["fingerprint"]:
        source = ", ".join(header["paths"]) or "the embedded corpus"
        raise DataError(
            f"the data of {run} has changed since it was started, so a resume would not continue the same run; "
            f"put the text back as it was ({source}), or start a new run with quintic train"
        )
