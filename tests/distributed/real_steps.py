"""Run by test_real_steps.py on several ranks: the loop's steps against those of one process, and what they send.

Initial weights are equal bit for bit. In float32 routing is replayed: a sum in another order may send a token that was
nearly undecided to another expert, after which two trainings are two trainings.
"""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quintic.core.initial import initialize_
from quintic.data.config import DataConfig
from quintic.data.order import Order
from quintic.data.tokens import prepare
from quintic.engine import EngineConfig, loop, shard, step
from quintic.engine.checkpoint import TrainState
from quintic.engine.mesh import join_ranks
from quintic.engine.plan import make_plan
from quintic.engine.shard import divide_
from quintic.lm import LanguageModel, LMConfig
from quintic.lm.memory import saved_numbers_per_token
from quintic.lm.task import LanguageModelTask
from quintic.moe import MoE
from quintic.optim import OptimConfig, build_optimizer
from quintic.optim.sharded import local, own_part, whole

CONFIG = {"vocab_size": 264, "context": 32, "num_layers": 3, "d_model": 64, "aux_weight": 0.01, "aux_over": "sequence"}
ENGINE = EngineConfig(steps=10, batch_size=8, diagnose_every=0)
STEPS = 10
TOLERANCE = {"loss": 1e-4, "weights": 1e-2}
"""Of float32 after ten steps, relative: matrix signs turn rounding in small singular directions into steps."""


class Recorded:
    """The decisions of a layer, one after the other."""

    def __init__(self):
        self.decisions = []

    def __call__(self, ids):
        self.decisions.append(ids)
        return ids

    def clear(self):
        pass


class Replayed:
    """The decisions that were recorded, for the examples of this rank."""

    def __init__(self, recorded, ranks):
        self.decisions = iter(recorded.decisions)
        self.ranks = ranks
        self.different = 0

    def __call__(self, ids):
        examples = next(self.decisions).view(ENGINE.batch_size, -1, ids.shape[-1])
        wanted = examples[self.ranks.rank :: self.ranks.world].flatten(0, 1)
        self.different += int((ids != wanted).any(1).sum())
        return wanted

    def clear(self):
        pass


def parts_of(task, model, ranks=loop.ALONE, dtype=torch.float32, engine=ENGINE):
    optim = OptimConfig(lr=0.01)
    order = Order(task.num_examples, 0, task.fingerprint)
    optimizer, clipping = build_optimizer(model, optim), optim.make_clipping()
    return step.StepParts(task, model, optimizer, clipping, order, engine, optim, dtype, 1.0, None, ranks)


def train(parts):
    state, losses = TrainState(), []
    for _ in range(STEPS):
        step.take_step(parts, state)
        losses.append(state.row["loss"])
    return losses


def layers(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def divided(task, ranks, precision=LanguageModel.float):
    model = precision(task.build(initialize=False))
    divide_(model, ranks)
    initialize_(model, 0)
    return model


def check_initial_weights(task, ranks):
    """Bit for bit those of one process, and only this rank's part was made."""
    for precision in (LanguageModel.float, LanguageModel.double):
        alone = dict(precision(task.build(0)).named_parameters())
        for name, parameter in divided(task, ranks, precision).named_parameters():
            assert torch.equal(local(parameter), own_part(alone[name], parameter)), (name, precision)


def check_replayed(task, ranks, losses, alone, recorded):
    model = divided(task, ranks)
    replayed = []
    for layer, decisions in zip(layers(model), recorded, strict=True):
        layer.kept = Replayed(decisions, ranks)
        replayed.append(layer.kept)
    found = train(parts_of(task, model, ranks))
    worst = max(abs(a - b) / a for a, b in zip(losses, found, strict=True))
    assert worst < TOLERANCE["loss"], worst
    far = 0.0
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        distance = float((whole(local(q.detach()), q) - p.detach()).norm() / p.detach().norm())
        assert distance < TOLERANCE["weights"], (name, distance)
        far = max(far, distance)
    different = ranks.sum(sum(layer.different for layer in replayed))[0]
    return f"loss {worst:.1e}, weights {far:.1e}, {different:.0f} decisions replayed against the ranks' own"


class Sent(TorchDispatchMode):
    """Bytes that this process sends in a step, by purpose; sums over replicas in rings."""

    def __init__(self, ranks):
        super().__init__()
        self.shards, self.replicas = ranks.shards, ranks.world // ranks.shards
        self.bytes = {"weights": 0.0, "gradients": 0.0, "muon": 0.0}
        self.purpose = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, share = func.name(), (self.shards - 1) / self.shards
        if "all_gather_copy_in" in name:
            self.purpose = "weights"
        elif "chunk_cat" in name:
            self.purpose = "gradients"
        elif "send" in name:
            self.bytes[self.purpose] += sum(t.nbytes for t in args[0])
        elif "allreduce_" in name and max(t.numel() for t in args[0]) > 1000:  # fewer are counts and norms
            self.bytes["gradients"] += 2 * (self.replicas - 1) / self.replicas * sum(t.nbytes for t in args[0])
        elif "alltoall_base" in name:
            self.bytes["muon"] += share * args[1].nbytes  # on average over the ranks
        return out


def check_traffic(task, ranks, dtype, **changes):
    engine = EngineConfig(**{"steps": 10, "batch_size": 8, "diagnose_every": 0, **changes})
    model = task.build(initialize=False)
    divide_(model, ranks, reshard=engine.reshard)
    initialize_(model, 0)
    parts, state = parts_of(task, model, ranks, dtype, engine), TrainState()
    step.take_step(parts, state)  # the first prepares
    with Sent(ranks) as sent:
        step.take_step(parts, state)
    found = dict(zip(sent.bytes, (n / ranks.world for n in ranks.sum(*sent.bytes.values())), strict=True))
    with torch.device("meta"):
        shell = task.build(initialize=False)
    plan = make_plan(
        shell, ranks=ranks.world, shards=ranks.shards, examples_per_step=8, micro_batch=engine.micro_batch_size,
        tokens_per_example=32, flops_per_token=1.0, active=1, logits=1, compute_bytes=2, reshard=engine.reshard,
        activation_numbers_per_token=saved_numbers_per_token(task.config),
    )  # fmt: skip
    for kind, planned in plan.sent_per_step.items():
        assert abs(found[kind] - planned) <= 0.03 * planned, (dtype, changes, kind, found, plan.sent_per_step)
    # The claim of Moonlight's report: Muon sends between 1 and 1.25 times what AdamW sends.
    ratio = 1 + found["muon"] / (found["weights"] + found["gradients"])
    assert ranks.shards == 1 or 1 < ratio <= 1.25, ratio
    return f"{ratio:.3f}"


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = prepare(None, DataConfig(tokenizer="byte", validation_fraction=0.01))
    task, few = (LanguageModelTask(LMConfig(**CONFIG, num_experts=n), data, cross_documents=True) for n in (8, 3))
    alone = task.build(0)  # before there is a process group, in which the load of experts would be summed
    recorded = [Recorded() for _ in layers(alone)]
    for layer, each in zip(layers(alone), recorded, strict=True):
        layer.kept = each
    losses = train(parts_of(task, alone))
    with join_ranks(torch.device("cpu"), int(sys.argv[1])) as ranks:
        check_initial_weights(task, ranks)
        check_initial_weights(few, ranks)  # stacks of fewer experts than shards are cut inside the experts
        words = check_replayed(task, ranks, losses, alone, recorded)
        ratios = [
            check_traffic(task, ranks, torch.float32),
            check_traffic(task, ranks, torch.float32, micro_batch_size=1),
        ]
        shard.TOGETHER = 0  # every block by itself, as in a large model
        words += "; in blocks " + check_replayed(task, ranks, losses, alone, recorded)
        ratios += [
            check_traffic(task, ranks, torch.float32),
            check_traffic(task, ranks, torch.bfloat16),
            check_traffic(task, ranks, torch.float32, micro_batch_size=1),
            check_traffic(task, ranks, torch.bfloat16, reshard=False),
        ]
        if ranks.is_main:
            print("all agree:", words, "- Muon over AdamW:", *ratios)


if __name__ == "__main__":
    main()
