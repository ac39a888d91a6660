"""``quintic resume``: go on with a run that was stopped or killed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from quintic.cli.printing import say
from quintic.core import DataError

__all__ = ["resume"]


def resume(run: Path, /, *, device: str | None = None, log: str | None = None) -> None:
    """Continue a stopped run to its last step, bit for bit as if it had never stopped.

    Parameters
    ----------
    run
        The run folder.
    device
        Continue on another device than the run's own.
    log
        Send the metrics to tensorboard, trackio or wandb too, as for train.

    Examples
    --------
    quintic resume runs/book
    """
    from quintic.cli.train import run_training
    from quintic.cli.wiring import build_task, open_run, refuse_untrained
    from quintic.core.machine import pick_device
    from quintic.engine.checkpoint import list_checkpoints
    from quintic.engine.mesh import join_ranks, world_size
    from quintic.engine.metrics import read_metrics
    from quintic.engine.sinks import check_sink

    if log is not None:
        check_sink(log)
    folder, settings, header = open_run(run)
    rows = read_metrics(folder.metrics_file)
    steps = settings["engine"].steps
    refuse_untrained(run, header)
    if rows and rows[-1]["step"] >= steps and steps in list_checkpoints(folder.checkpoints):
        say(f"{run} is finished: all {steps} steps are done; nothing to resume")
        return
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
            task, settings, _ = build_task(header["task"], [Path(path) for path in header["paths"]], settings)
        if task.fingerprint != header["fingerprint"]:
            source = ", ".join(header["paths"]) or "the embedded corpus"
            raise DataError(
                f"the data of {run} has changed since it was started, so a resume would not continue the same run; "
                f"put the text back as it was ({source}), or start a new run with quintic train"
            )
        run_training(console, task, settings, folder, ranks, log)
