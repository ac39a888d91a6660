"""The setting that somebody means who names it as other programs do, without its section, or with a slip."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ELSEWHERE", "did_you_mean", "meant"]

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate", "max_lr", "peak_lr", "matrix_lr", "muon_lr"),
    "adamw_lr": ("adam_lr", "embedding_lr", "scalar_lr"),
    "weight_decay": ("wd",),
    "adamw_eps": ("eps", "epsilon", "adam_eps", "adam_epsilon"),
    "adamw_beta1": ("beta1", "adam_beta1", "betas"),
    "adamw_beta2": ("beta2", "adam_beta2"),
    "name": ("optimizer", "optim"),
    "schedule": ("lr_schedule", "scheduler", "lr_scheduler", "lr_scheduler_type"),
    "warmup_fraction": ("warmup", "warmup_steps", "warmup_iters", "warmup_ratio", "lr_warmup_steps"),
    "decay_fraction": ("warmdown", "warmdown_ratio", "cooldown", "lr_decay_iters", "decay_steps"),
    "final_lr_fraction": ("min_lr", "final_lr", "min_lr_ratio", "final_lr_frac"),
    "clip_norm": ("grad_clip", "clip_grad", "clip_grad_norm", "max_norm", "max_grad_norm", "gradient_clip_val"),
    "coefficients": ("ns_coefficients", "ns_steps"),
    "steps": ("max_steps", "num_steps", "train_steps", "total_steps", "max_iters", "iters", "iterations",
              "num_iterations"),
    "max_epochs": ("epochs", "num_epochs", "num_train_epochs", "n_epochs"),
    "batch_size": ("batch", "bs", "global_batch_size", "total_batch_size", "train_batch_size"),
    "micro_batch_size": ("device_batch_size", "per_device_train_batch_size", "grad_accum", "grad_accum_steps",
                         "gradient_accumulation_steps", "accumulate_grad_batches"),
    "eval_every": ("eval_interval", "eval_steps", "val_interval", "val_check_interval", "val_every"),
    "checkpoint_every": ("save_every", "save_interval", "save_steps", "ckpt_every"),
    "keep_last": ("save_total_limit", "keep_latest_k"),
    "sample_every": ("sample_interval",),
    "dtype": ("precision", "bf16", "fp16", "mixed_precision"),
    "ema_decay": ("ema", "ema_rate"),
    "seed": ("random_seed", "random_state"),
    "shards": ("fsdp", "dp_shard", "data_parallel_shard_degree"),
    "context": ("seq_len", "seq_length", "sequence_length", "max_seq_len", "sequence_len", "block_size",
                "context_length", "max_position_embeddings"),
    "d_model": ("hidden_size", "n_embd", "embed_dim", "embedding_dim", "hidden_dim", "model_dim", "dim"),
    "num_layers": ("n_layer", "n_layers", "layers", "depth", "num_hidden_layers"),
    "num_heads": ("n_head", "n_heads", "heads", "num_attention_heads"),
    "d_ff": ("intermediate_size", "ffn_dim", "ff_dim", "ffn_hidden_size"),
    "d_expert": ("moe_intermediate_size", "expert_dim"),
    "num_experts": ("experts", "n_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("topk", "k", "num_experts_per_tok", "experts_per_token"),
    "num_shared": ("n_shared_experts", "num_shared_experts"),
    "aux_weight": ("aux_loss", "router_aux_loss_coef", "aux_loss_alpha", "load_balancing_loss_weight"),
    "z_weight": ("z_loss", "router_z_loss", "router_z_loss_coef"),
    "rope_theta": ("rope_base",),
    "checkpoint": ("activation_checkpointing", "gradient_checkpointing", "remat"),
    "compile": ("torch_compile",),
    "field": ("text_field", "text_column", "column", "dataset_text_field"),
    "validation_fraction": ("val_fraction", "val_split", "validation_split", "val_ratio"),
    "test_fraction": ("test_split", "test_ratio"),
    "width": ("channels_base", "model_channels", "base_channels"),
    "size": ("image_size", "resolution", "img_size"),
}  # fmt: skip
"""{field of a setting: what other programs call it}."""

_FIELD_OF = {other: field for field, others in ELSEWHERE.items() for other in others}


def meant(name: str, known: Iterable[str]) -> str | None:
    """The known setting that a name stands for; None if nothing is near.

    Args:
        name: What was typed: ``section.field``, a field alone, or an option with its dashes and value.
        known: ``section.field`` of all settings.

    Example:
        >>> known = ["optim.lr", "optim.decay_rank", "engine.steps", "lm.d_model"]
        >>> [meant(name, known) for name in ("optim.learning_rate", "--max-steps", "lm.hidden_size", "engine.stepz")]
        ['optim.lr', 'engine.steps', 'lm.d_model', 'engine.steps']
        >>> meant("optim.colour", known)
    """
    section, _, field = name.partition("=")[0].strip("-").replace("-", "_").rpartition(".")
    known = sorted(known, key=lambda key: (not key.startswith(f"{section}."), key))  # the section that was said first
    of_field: dict[str, str] = {}
    for key in known:
        of_field.setdefault(key.rpartition(".")[2], key)
    for exact in (field, field.lower(), _FIELD_OF.get(field.lower(), "")):
        if exact in of_field:
            return of_field[exact]
    # Whole names share a section, which would make unlike fields look alike.
    close = difflib.get_close_matches(field, of_field, n=1, cutoff=0.7)
    return of_field[close[0]] if close else None


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """What to add to the message about an unknown setting.

    Example:
        >>> did_you_mean("optim.wd", ["optim.weight_decay", "engine.steps"])
        "; did you mean 'optim.weight_decay'?"
        >>> did_you_mean("optim.colour", ["optim.weight_decay", "engine.steps"])
        '; optim has weight_decay'
        >>> did_you_mean("colour", ["optim.weight_decay", "engine.steps"])
        '; write section.field=value, with one of the sections engine, optim'
    """
    known = list(known)
    if (setting := meant(key, known)) is not None:
        return f"; did you mean '{setting}'?"
    sections = sorted({name.rpartition(".")[0] for name in known})
    section = key.rpartition(".")[0]
    if section in sections:
        fields = sorted(name.rpartition(".")[2] for name in known if name.startswith(f"{section}."))
        return f"; {section} has {', '.join(fields)}"
    return f"; write section.field=value, with one of the sections {', '.join(sections)}"
