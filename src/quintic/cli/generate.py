"""``quintic generate``: text from a trained run."""

from __future__ import annotations

from pathlib import Path

__all__ = ["generate"]


def generate(
    run: Path,
    /,
    *,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.9,
    seed: int = 0,
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Continue a prompt with a run's model; the text goes to standard output as it is made.

    Parameters
    ----------
    run
        The run folder.
    prompt
        Text to continue; without one the model starts a document of its own.
    max_tokens
        Tokens to make at most; fewer if the model ends the document.
    temperature
        0 always takes the likeliest token; 1 samples from the model's own distribution.
    top_k
        Keep the k likeliest tokens only; 0 keeps all.
    top_p
        Keep the smallest likeliest set with at least this probability.
    seed
        The same seed gives the same text.
    checkpoint
        best (lowest validation loss), last, or a step number.
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        auto, float32, bfloat16 or float64; the run's own if left out.
    """
    from quintic.cli.wiring import kind_of, load_run_model

    loaded = load_run_model(run, checkpoint, device, dtype)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    kind_of(loaded.header["task"]).generate(loaded, run, prompt=prompt, **sampling)
