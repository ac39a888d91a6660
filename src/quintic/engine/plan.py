"""What a training run would need, before it is started: parameters, bytes per rank, communication, hours.

Everything follows from the shapes and declared roles of a model on the meta device; nothing is allocated. Ranks form a
mesh of R replicas of S shards (R S = N). A rank holds 1/S of weights, gradients and optimizer state, and gathers one
group of blocks at a time (:mod:`quintic.engine.shard`), and the embedding and the head. In bfloat16 the matrices that
were used are kept in it too, from the forward to the backward pass: all of them, or with activation checkpointing those
of a block. Per step a rank sends, with P parameters (in elements), B of them in blocks that are gathered apart:

    gather of the weights, forward and backward    (S-1)/S (P + B) in float32, once per micro-batch;
                                                                   without B where they are kept (reshard = false)
    sum of the gradients over the shards               (S-1)/S P   in float32, once per micro-batch
    sum of the gradients over the replicas      2 (R-1)/R P / S    in float32
    Muon: matrices to their owners and back        2 (S-1)/S^2 P2  in float32, P2 without expert stacks, which are
                                                                   sharded by expert and stay where they are

so with one micro-batch Muon adds 2 P2 / (S (2 P + B)) to the volume of AdamW. Activations are an estimate, tested to a
quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from quintic.core import ConfigError
from quintic.core.roles import Role, declared_roles
from quintic.engine.shard import gathered_apart
from quintic.optim import roles as route

__all__ = ["Plan", "as_rows", "check_batch", "make_plan"]

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Plan:
    """Needs of a run; bytes are per rank, communication is per rank and step."""

    ranks: int
    shards: int
    parameters: dict[str, int]
    """total, active per token, and both without embedding and head."""
    bytes_per_rank: dict[str, int]
    """weights, gradients, optimizer, weights in bfloat16, gathered weights, activations, logits."""
    sent_per_step: dict[str, int]
    """weights, gradients, muon."""
    tokens_per_step: int
    micro_batch: int
    """Examples of one forward pass on one rank."""
    flops_per_token: float
    checkpoint: bool
    """Whether blocks are computed again in the backward pass."""
    task: str = "lm"
    """Whose settings the advice names."""

    @property
    def total_bytes(self) -> int:
        """Bytes per rank, all together."""
        return sum(self.bytes_per_rank.values())

    @property
    def muon_overhead(self) -> float:
        """Bytes that Muon sends beyond AdamW, as a share of AdamW's."""
        return self.sent_per_step["muon"] / max(1, self.sent_per_step["weights"] + self.sent_per_step["gradients"])

    def hours(self, tokens: float, flops_per_second: float, mfu: float) -> float:
        """Time to train on an amount of tokens.

        Args:
            tokens: How many.
            flops_per_second: Peak of one rank's matrix products.
            mfu: Share of it that is reached, in (0, 1].
        """
        return tokens * self.flops_per_token / (self.ranks * flops_per_second * mfu) / 3600

    def advice(self, memory_bytes: float) -> list[str]:
        """What to change if a rank has less memory than this needs; empty if it fits."""
        if self.total_bytes <= memory_bytes:
            return []
        b = self.bytes_per_rank
        fixed = b["weights"] + b["gradients"] + b["optimizer"]
        size, unit = _unit(self.total_bytes)
        found = [f"{self.total_bytes / size:,.1f} {unit} do not fit in {memory_bytes / size:,.1f} {unit} per rank:"]
        passing = b["activations"] > 0.3 * self.total_bytes
        if passing and self.micro_batch > 1:
            fits = int(self.micro_batch * (1 - (self.total_bytes - memory_bytes) / b["activations"]))
            found.append(f"set engine.micro_batch_size={max(1, fits)} or less: fewer activations, the same step")
        if self.task == "lm" and b["weights in bfloat16"] > 0.2 * memory_bytes and not self.checkpoint:
            found.append("set lm.checkpoint=true: weights in bfloat16 and activations are then those of a block")
        if fixed > 0.5 * memory_bytes:
            need = -(-fixed * self.shards // int(0.5 * memory_bytes))
            found.append(f"shard over {need} ranks: weights, gradients and optimizer state then take half of a rank")
        if passing and self.micro_batch == 1:
            smaller = "a shorter lm.context" if self.task == "lm" else "smaller images, data.size"
            found.append(f"use {smaller}: the activations of one example are most of it")
        if passing and self.task == "tarflow" and not self.checkpoint:
            found.append(
                "set tarflow.checkpoint=true: less is kept of every image, a third on a CPU, most of it elsewhere"
            )
        if len(found) == 1:
            found.append("use fewer layers or a smaller width")
        return found


def check_batch(batch_size: int, ranks: int) -> None:
    """Raise ConfigError if the examples of a step do not divide among the ranks."""
    if batch_size % ranks:
        raise ConfigError(
            f"engine.batch_size = {batch_size} does not divide among {ranks} ranks; "
            f"use a multiple of {ranks}, such as {-(-batch_size // ranks) * ranks}"
        )


def make_plan(
    model: nn.Module,
    *,
    ranks: int,
    shards: int,
    examples_per_step: int,
    micro_batch: int,
    tokens_per_example: int,
    flops_per_token: float,
    active: int,
    activation_numbers_per_token: float,
    logits: int,
    compute_bytes: int,
    optimizer: str = "muon",
    reshard: bool = True,
    checkpoint: bool = False,
    task: str = "lm",
) -> Plan:
    """Work out the needs of a run.

    Args:
        model: On the meta device, roles declared.
        ranks: N.
        shards: S, a divisor of N.
        examples_per_step: Examples of one optimizer step, over all ranks.
        micro_batch: Examples of one forward pass on one rank.
        tokens_per_example: Length of an example.
        flops_per_token: Forward and backward.
        active: Parameters at work on a token.
        activation_numbers_per_token: Kept for the backward pass, in numbers of the compute dtype.
        logits: How many of them are in memory at a time.
        compute_bytes: Bytes of a number in matrix products: 2 for bfloat16.
        optimizer: muon or adamw.
        reshard: Whether gathered blocks are put away between forward and backward pass, ``engine.reshard``.
        checkpoint: Whether blocks are computed again in the backward pass, ``lm.checkpoint``.
        task: Whose settings the advice names.

    Raises:
        ConfigError: The ranks do not form such a mesh, or the batch does not divide among them.
    """
    if ranks < 1 or shards < 1 or ranks % shards:
        raise ConfigError(f"{ranks} ranks do not divide into groups of {shards} shards; choose a divisor of {ranks}")
    check_batch(examples_per_step, ranks)
    micro_batch = min(micro_batch or examples_per_step, examples_per_step // ranks)
    micro_batches = -(-examples_per_step // (ranks * micro_batch))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    found = declared_roles(model)
    tables = sum(n for name, n in sizes.items() if found[name].role in (Role.EMBEDDING, Role.HEAD))
    under_muon = {row.name for row in route(model) if row.algorithm == "muon"} if optimizer == "muon" else set()
    muon = sum(sizes[name] for name in under_muon)
    owned_by_muon = sum(sizes[name] for name in under_muon if found[name].role is not Role.EXPERT_STACK)
    largest = max(_block_sizes(model), default=0)
    apart = _sizes_apart(model)
    replicas = ranks // shards
    tokens = micro_batch * tokens_per_example
    share = (shards - 1) / shards
    return Plan(
        ranks,
        shards,
        {
            "total": total,
            "active": active,
            "total without embedding and head": total - tables,
            "active without embedding and head": active - tables,
        },
        {
            "weights": 4 * total // shards,
            "gradients": 4 * total // shards,
            "optimizer": 4 * (muon + 2 * (total - muon)) // shards,
            "weights in bfloat16": 0 if compute_bytes == 4 else 2 * (largest if checkpoint else total - tables),
            "gathered weights": 0 if shards == 1 else _gathered(total, apart, reshard),
            "activations": int(tokens * activation_numbers_per_token * compute_bytes),
            "logits": logits * (4 if compute_bytes == 4 else 8),  # the product and the gradient in bfloat16 too
        },
        {
            "weights": int(share * (total + reshard * sum(apart)) * 4 * micro_batches),
            "gradients": int(share * total * 4 * micro_batches + 2 * (replicas - 1) / replicas * total / shards * 4),
            "muon": int(2 * share / shards * owned_by_muon * 4),
        },
        examples_per_step * tokens_per_example,
        micro_batch,
        flops_per_token,
        checkpoint,
        task,
    )


def _gathered(total: int, apart: list[int], reshard: bool) -> int:
    """Bytes of whole weights that are here for a time, and of their whole gradients, in float32.

    What is not gathered apart (embedding and head, or a small model) is here as long as any block is; of the groups of
    blocks there are two at a time, as the next one is fetched meanwhile, or all of them if none is put away.
    """
    largest, in_blocks = max(apart, default=0), sum(apart)
    outside = total - in_blocks
    return 4 * (outside + (min(2 * largest, in_blocks) if reshard else in_blocks)) + 4 * (outside + largest)


def _sizes_apart(model: nn.Module) -> list[int]:
    """Parameters of every group of blocks that is gathered by itself."""
    taken: set[nn.Parameter] = set()
    sizes = []
    for group in reversed(gathered_apart(model)):  # inner blocks first, as they are divided
        own = {p for block in group for p in block.parameters()} - taken
        sizes.append(sum(p.numel() for p in own))
        taken |= own
    return sizes


def _block_sizes(model: nn.Module) -> list[int]:
    """Parameters of every member of every module list: what is computed again together."""
    return [
        sum(p.numel() for p in block.parameters())
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]


def as_rows(plan: Plan) -> list[tuple[str, str]]:
    """A plan in words: (what, how much)."""
    rows: list[tuple[str, Any]] = [
        ("parameters " + name, f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B")
        for name, count in plan.parameters.items()
    ]
    size, unit = _unit(plan.total_bytes)
    rows += [(f"{name}, {unit} a rank", f"{count / size:,.2f}") for name, count in plan.bytes_per_rank.items()]
    rows.append((f"together, {unit} a rank", f"{plan.total_bytes / size:,.2f}"))
    rows += [
        (f"{name} sent, {unit} a step and rank", f"{count / size:,.2f}") for name, count in plan.sent_per_step.items()
    ]
    rows.append(("Muon beyond AdamW's communication", f"{plan.muon_overhead:.1%}"))
    rows.append(("tokens a step", f"{plan.tokens_per_step:,}"))
    rows.append(("FLOPs a token", f"{plan.flops_per_token:.3g}"))
    return rows


def _unit(most: float) -> tuple[int, str]:
    """The unit of memory in which an amount is not less than one, and its name."""
    return (_GIB, "GiB") if most >= _GIB else (_MIB, "MiB")
