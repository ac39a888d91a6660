"""``quintic export``: a trained language model as a folder that Hugging Face tools load."""

from __future__ import annotations

from pathlib import Path

from quintic.cli.printing import say
from quintic.core import CheckpointError
from quintic.core.files import check_folder

__all__ = ["export"]


def export(run: Path, folder: Path, /, *, checkpoint: str = "best") -> None:
    """Export a language model as a DeepSeek-V3 folder, which transformers loads: config, safetensors, tokenizer.

    A model that came from such a folder (import, train --from) gets that folder's tokenizer, template of chats and
    settings of generation.

    In Python, load it with transformers.AutoModelForCausalLM.from_pretrained(FOLDER).

    Parameters
    ----------
    run
        The run folder.
    folder
        Folder to create; it must not exist.
    checkpoint
        best (lowest validation loss), last, or a step number.

    Examples
    --------
    quintic export runs/book exported
    quintic export runs/book exported --checkpoint last
    """
    from quintic.cli.language import own_tokenizer
    from quintic.cli.wiring import load_run_model
    from quintic.lm import LanguageModel, save_deepseek

    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose a folder that does not")
    check_folder(folder.parent)
    loaded = load_run_model(run, checkpoint, "cpu", "float32")
    if not isinstance(loaded.model, LanguageModel):
        raise CheckpointError(f"{run} is a run of task {loaded.header['task']}; only language models can be exported")
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_deepseek(loaded.model, folder, own_tokenizer(run, loaded.settings))
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{folder}: DeepSeek-V3 for transformers, {size / 2**20:,.1f} MiB")
