"""What the end of a step calls for, by the periods in the settings; the last step calls for everything."""

from __future__ import annotations

from dataclasses import dataclass

from quintic.engine.config import EngineConfig

__all__ = ["Due", "due_after", "every"]


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    save: bool
    evaluate: bool
    sample: bool


def due_after(step: int, engine: EngineConfig) -> Due:
    """What is due after the ``step``-th step.

    Example:
        >>> due_after(20, EngineConfig(steps=50, checkpoint_every=10, eval_every=15))
        Due(save=True, evaluate=False, sample=False)
    """
    end = step == engine.steps
    return Due(
        end or every(engine.checkpoint_every, step),
        end or every(engine.eval_every, step),
        end or every(engine.sample_every, step),
    )


def every(period: int, step: int) -> bool:
    """Whether a step is one of every ``period``; 0 is never."""
    return bool(period) and step % period == 0
