"""Checkpoints that are gone while the metrics are there: to go on would be to begin anew and to write over them."""

from __future__ import annotations

from quintic.core import CheckpointError
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.config import EngineConfig
from quintic.engine.metrics import iter_metrics
from quintic.engine.periods import due_after
from quintic.engine.run import Run

__all__ = ["refuse_lost"]


def refuse_lost(run: Run, engine: EngineConfig, stable: int | None = None) -> None:
    """Make sure that a run has the checkpoints that its metrics tell of.

    One that was killed before its first save has none, and begins again.

    Args:
        run: To be continued.
        engine: Its settings.
        stable: Step after which it saves besides, before the rate falls.

    Raises:
        CheckpointError: It has none, and had some.
    """
    if list_checkpoints(run.checkpoints):
        return
    last = max((row["step"] for row in iter_metrics(run.metrics_file)), default=0)
    begun = sum(due_after(step, engine).save or step == stable for step in range(1, min(last, engine.steps) + 1))
    # Rows follow the save that was due before them; one in the background is finished when the next one is begun.
    had = begun > int(engine.background_save) or run.facts().get("steps")
    if last and had:
        raise CheckpointError(
            f"the metrics of {run.folder} reach step {last}, but there is no checkpoint to go on from: training would "
            f"begin at step 0 and write over them. Put the folders step-N back into {run.checkpoints}; or start again "
            f"with quintic train and another --out, or here, by deleting {run.metrics_file}"
        )
