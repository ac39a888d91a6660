"""``quintic matrix compress``: a trained language model with fewer neurons, as a run folder like any other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from quintic.cli.printing import say
from quintic.core import ConfigError
from quintic.core.files import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from quintic.cli.wiring import LoadedModel
    from quintic.data.tokens import TokenData
    from quintic.lm import LMConfig
    from quintic.lm.task import LanguageModelTask
    from quintic.lowrank import Compression

__all__ = ["compress"]

_BATCH_TOKENS = 4096
_HELD_OUT = 4  # the held-out data is a fourth as much


def compress(
    run: Path,
    /,
    *data: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    keep: float = 0.5,
    rule: str = "quality",
    tokens: int = 32_768,
    checkpoint: str = "best",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Take neurons out of a trained language model (interpolative decomposition of its activations).

    The new run folder can be used with generate, evaluate and export; train --from trains it on.

    Parameters
    ----------
    run
        The run folder of a language model.
    data
        Text to calibrate and validate on, if not the run's own.
    out
        Run folder to create.
    keep
        Share of the neurons that every feed-forward network and every expert keeps.
    rule
        Rule that chooses: quality, fast, pivoted-qr, norms-top ..., or weight-norms, which looks at no activations.
    tokens
        How many tokens of the training split to calibrate on.
    checkpoint
        best (lowest validation loss), last, or a step number.
    device
        auto, cpu, cuda or cuda:1.
    seed
        Seed of what is drawn at random: the calibration text, and by some rules the neurons.

    Examples
    --------
    quintic matrix compress runs/book --keep 0.5 --out runs/book-half
    quintic matrix compress runs/book other.txt --out runs/book-half
    """
    import torch

    from quintic.cli.language import own_tokenizer
    from quintic.cli.wiring import load_run_model
    from quintic.engine import Run
    from quintic.lm import LanguageModel
    from quintic.lm.task import LanguageModelTask
    from quintic.lowrank import compress as cut

    if not 0 < keep < 1:
        raise ConfigError(f"--keep {keep:g}: expected a share of the neurons, above 0 and below 1")
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: expected at least 1, better thousands")
    Run.refuse_existing(out)
    for path in data:
        check_name(path)
    loaded = load_run_model(run, checkpoint, device, None)
    model = loaded.model
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"{run} is a run of task {loaded.header['task']}; only language models can be compressed")
    text = _text(loaded, run, list(data))
    one = next(model.parameters())
    where, settings = one.device, loaded.settings
    crossing = settings["data"].cross_documents
    config = smaller(model.config, keep)

    def windows(part: TokenData, count: int) -> Iterator[dict[str, Tensor]]:
        task = LanguageModelTask(model.config, part, cross_documents=crossing)
        return ({name: t.to(where) for name, t in batch.items()} for batch in _draw(task, count, seed))

    task = LanguageModelTask(model.config, text, cross_documents=crossing)
    held_out = replace(text, train=text.validation)
    with loaded.precision, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* rows of calibration data")  # said below, with what to do here
        before = task.evaluate(model, "validation")
        result = cut(
            model,
            windows(text, tokens),
            keep=widths(model.config, config),
            rule=rule,
            held_out=windows(held_out, max(1, tokens // _HELD_OUT)) if before else None,
            forward=task.loss,
            seed=seed,
        )
        made = LanguageModel(config, initialize=False).to(where)
        if one.dtype == torch.float64:
            made.double()
        made.load_state_dict(result.module.state_dict())
        after = LanguageModelTask(config, text, cross_documents=crossing).evaluate(made, "validation")

    why = f"compressed from {run}"
    for name in ("d_ff", "d_expert"):
        settings = settings.derive(f"lm.{name}", getattr(config, name), why)
    header = {**loaded.header, "size": "compressed", "from": str(run.absolute())}
    header = {name: value for name, value in header.items() if not isinstance(value, dict)}
    if data:
        header |= {"paths": [str(path.absolute()) for path in data], "fingerprint": task.fingerprint}
        settings = settings.derive("data.tokenizer", str((out / "tokenizer.json").absolute()), why)
    folder = Run.create(out, settings, header, made.state_dict())
    own_tokenizer(run, settings).save(out / "tokenizer.json")
    bits = [values["val_bits_per_byte"] for values in (before, after) if values]
    folder.record(
        task="lm", size="compressed", title=run.absolute().name, status="compressed",
        parameters_total=result.parameters_after, keep=keep, rule=rule, val_bits_per_byte=bits,
    )  # fmt: skip
    _print(result, bits, one.itemsize)
    say(f'{out} is ready; next: quintic generate {out} --prompt "..." - or: quintic train TEXT --from {out}')


def smaller(config: LMConfig, keep: float) -> LMConfig:
    """A model's sizes with a share of the neurons."""
    return replace(config, **{name: max(1, round(keep * getattr(config, name))) for name in ("d_ff", "d_expert")})


def widths(old: LMConfig, new: LMConfig) -> dict[str, float | int]:
    """{hidden layer: neurons it keeps}: all experts of one size, so that the architecture stays what it was."""
    found: dict[str, float | int] = {}
    for index in range(old.num_layers):
        here = f"blocks.{index}.ffn"
        if index < old.num_dense_layers:
            found[here] = new.d_ff
        elif old.dense:
            found[here] = (old.top_k + old.num_shared) * new.d_expert
        else:
            found[f"{here}.experts"] = new.d_expert
            if old.num_shared:
                found[f"{here}.shared"] = old.num_shared * new.d_expert
    return found


def _text(loaded: LoadedModel, folder: Path, paths: list[Path]) -> TokenData:
    """The run's own text, or another, by the run's tokenizer."""
    from quintic.cli.language import own_task
    from quintic.data import prepare

    if paths:
        return prepare(paths, replace(loaded.settings["data"], tokenizer=str(folder / "tokenizer.json")))
    return own_task(loaded, folder).data


def _draw(task: LanguageModelTask, tokens: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of windows from anywhere in the text."""
    import numpy as np

    from quintic.core.counter_rng import Stream

    context = task.config.context
    count = math.ceil(tokens / context)
    numbers = np.arange(task.num_examples)
    if count < task.num_examples:
        numbers = numbers[np.argsort(Stream(seed, "calibration").uniform(0, task.num_examples))[:count]]
    size = max(1, _BATCH_TOKENS // context)
    for start in range(0, len(numbers), size):
        yield task.batch(numbers[start : start + size])


def _print(result: Compression, bits: list[float], itemsize: int) -> None:
    console = Console()
    table = Table("layer", "neurons", "parameters", "error", "held out", box=None, pad_edge=False)
    for layer in result.layers:
        neurons = f"{layer.parts} x {layer.before[1]} -> {layer.after[1]}".removeprefix("1 x ")
        size = f"{layer.parameters_before:,} -> {layer.parameters_after:,}"
        held = "" if layer.held_out_error is None else f"{layer.held_out_error:.3f}"
        table.add_row(layer.name, neurons, size, f"{layer.error:.3f}", held)
    console.print(table)
    say("errors: relative, of the outputs of a layer by itself, on calibration and on validation text", console=console)
    for layer in result.layers:
        if shortage := layer.shortage("tokens"):
            say(f"warning: {shortage}; raise --tokens", console=console, style="yellow")
    old, new = result.parameters_before, result.parameters_after
    say(f"parameters: {old:,} -> {new:,}; weights {old * itemsize:,} -> {new * itemsize:,} bytes", console=console)
    if bits:
        say(f"validation: {bits[0]:.4f} -> {bits[1]:.4f} bits per byte", console=console)
