"""``quintic evaluate``: loss and bits per byte on text that was not trained on."""

from __future__ import annotations

from pathlib import Path

from quintic.cli.printing import say

__all__ = ["evaluate"]


def evaluate(
    run: Path,
    /,
    *data: Path,
    split: str = "test",
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Evaluate a run on its own held-out test split, or on other text.

    Parameters
    ----------
    run
        The run folder.
    data
        Files and folders to evaluate on, whole; without any, a split of the run's own data.
    split
        test or validation, of the run's own data.
    checkpoint
        best (lowest validation loss), last, or a step number.
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        auto, float32, bfloat16 or float64; the run's own if left out.
    """
    from quintic.cli.wiring import evaluate_run

    values, what = evaluate_run(run, list(data), split, checkpoint, device, dtype)
    loss = next(value for name, value in values.items() if name.endswith("_loss"))
    bits = next(value for name, value in values.items() if name.endswith("_bits_per_byte"))
    say(f"{what}: loss {loss:.4f} nats a token, {bits:.4f} bits per byte")
