"""The engine: settings, run folders, checkpoints and the one training loop of every task."""

from quintic.engine.config import EngineConfig, Settings
from quintic.engine.run import Run
from quintic.engine.task import Task

__all__ = ["EngineConfig", "Run", "Settings", "Task"]
