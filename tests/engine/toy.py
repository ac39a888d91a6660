"""A task small enough to train in milliseconds: fit a linear map, with dropout to use the random generator."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from quintic.core.initial import initialize_
from quintic.core.loss import Loss
from quintic.core.roles import Normal, Role, declare
from quintic.engine import EngineConfig, Run, Settings
from quintic.engine.checkpoint import list_checkpoints
from quintic.engine.loop import train
from quintic.engine.metrics import read_metrics
from quintic.engine.verification import TIMINGS
from quintic.optim import OptimConfig

TYPES = {"engine": EngineConfig, "optim": OptimConfig}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 6))
        self.head = nn.Parameter(torch.empty(3, 4))
        declare(self, "weight", Role.MATRIX, Normal(0.5))
        declare(self, "head", Role.HEAD, Normal(0.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return nn.functional.dropout(x @ self.weight.t(), 0.2, self.training) @ self.head.t()


class ToyTask:
    name = "toy"
    samples_whole = False
    fingerprint = "toy-1"
    num_examples = 37

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(37, 6, generator=g)
        self.y = self.x @ torch.randn(6, 3, generator=g)
        self.stop_evaluations = False
        self.poison_step = None
        self.steps = 0

    def build(self, seed=None, *, initialize=True):
        model = Toy()
        if initialize:
            initialize_(model, seed)
        return model

    def describe(self):
        return [], {}

    def batch(self, examples):
        rows = torch.from_numpy(np.asarray(examples))
        return {"x": self.x[rows], "y": self.y[rows]}

    def loss(self, model, batch):
        total = (model(batch["x"]) - batch["y"]).square().sum()
        if self.steps == self.poison_step:
            total = total * float("nan")
        return Loss(total, batch["y"].numel())

    def after_step(self, model, progress):
        self.steps += 1
        model.calls += 1
        return {"calls": int(model.calls)}

    def step_metrics(self, loss):
        return {}

    def evaluate(self, model, split, should_stop, ranks):
        if self.stop_evaluations or should_stop():
            return None
        model.eval()
        with torch.no_grad():
            return {"val_loss": float((model(self.x) - self.y).square().mean())}

    def sample(self, model, path, seed, should_stop):
        Path(f"{path}.txt").write_text("sample")
        return "sample"

    def flops_per_example(self, model):
        return 1.0

    def save_with(self, folder):
        pass


def toy_run(folder, *overrides):
    base = ("engine.steps=12", "engine.batch_size=8", "engine.checkpoint_every=5", "engine.eval_every=5",
            "engine.device=cpu", "engine.dtype=float32", "optim.lr=0.05")  # fmt: skip
    settings = Settings.build(TYPES, {}, "none", [*base, *overrides])
    return settings, Run.create(folder, settings, {"task": "toy"})


def go(task, settings, run):
    return train(task, settings, run, Console(file=io.StringIO()), quiet_peak=True)


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(run.metrics_file)]


def final_of(run):
    folder = list(list_checkpoints(run.checkpoints).values())[-1]
    state = json.loads((folder / "state.json").read_text())
    numbers = {k: v for k, v in state.items() if k not in ("seconds", "row")}
    return load_file(folder / "model.safetensors"), load_file(folder / "training.safetensors"), numbers


def same(a, b):
    for left, right in zip(final_of(a)[:2], final_of(b)[:2], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert final_of(a)[2] == final_of(b)[2]
    assert rows_of(a) == rows_of(b)
