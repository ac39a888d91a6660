"""``quintic generate``: text or images from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["generate"]


def generate(
    run: Path,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True)] = None,
    n: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    label: Annotated[str | None, Parameter(name="--class")] = None,
    guidance: float | None = None,
    method: str | None = None,
    denoise: bool | None = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    overwrite: bool = False,
    seed: int = 0,
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Generate text, printed as it is made, or a grid of images, whichever the model has learned.

    Parameters
    ----------
    run
        The run folder; or a model that comes with the package, by its name: ddpm/fashion28, ddpm/emoji32,
        tarflow/fashion28.
    prompt
        Text to continue; without one the model starts a document of its own.
    max_tokens
        Tokens to make at most, 200 if left out; fewer if the model ends the document.
    temperature
        0 always takes the likeliest token; 1 samples from the model's own distribution; 0.7 if left out.
    top_k
        Keep only the k likeliest tokens; 0, as if left out, keeps all.
    top_p
        Keep only the likeliest tokens that together have this probability; 0.9 if left out.
    min_p
        Keep only tokens whose probability is at least this fraction of the likeliest one's.
    repetition_penalty
        Above 1, tokens that were there before become less likely; 1.1 is mild.
    stop
        End before this text; repeat for several.
    n
        How many texts, one after the other with seeds that follow each other, 1 if left out; or images, 36 if left out.
    steps
        Calls of the network per image of a diffusion model; more is finer and slower.
    sampler
        Sampler of a diffusion model: ddim (smooth, good with few steps) or ancestral.
    label
        Class of the images, its number or the name of its folder, or -1 for none. Left out, a flow draws all classes
        in turn, and a diffusion model none.
    guidance
        Strength of the guidance towards the class, about 1 to 3; a flow's --temperature then is of the pass without it.
    method
        How a flow is inverted: auto, sequential, jacobi or window:K; all give the same images.
    denoise
        --no-denoise shows a flow's images with the noise it was trained on.
    out
        PNG file of the images; their pixels go into an .npy file beside it. Default: in the run's samples, or
        here, under a free name.
    overwrite
        Replace image files that exist.
    seed
        Seed of the sampling: the same one gives the same text or images.
    checkpoint
        best (lowest validation loss), last, or a step number.
    device
        auto, cpu, cuda, cuda:1 or mps.
    dtype
        auto, float32, bfloat16 or float64; the run's own if left out.

    Examples
    --------
    quintic generate runs/book --prompt "Call me" --max-tokens 100
    quintic generate runs/book --temperature 0 --checkpoint last
    quintic generate runs/book --prompt "Call me" --n 3
    quintic generate runs/shapes --n 64 --out shapes.png
    quintic generate runs/flow --class cat --guidance 2
    """
    from quintic.cli.wiring import kind_of, load_run_model

    given = {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "stop": stop,
        "n": n, "steps": steps, "sampler": sampler, "label": label,
        "guidance": guidance, "method": method, "denoise": denoise, "out": out, "overwrite": overwrite or None,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    loaded = load_run_model(run, checkpoint, device, dtype)
    kind_of(loaded.header["task"]).generate(loaded, run, {"seed": seed, **options})
