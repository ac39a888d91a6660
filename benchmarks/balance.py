"""Balancing rules of posts 10735 and 10757 on a small language model: loss, balance, and how soon.

A three-layer model over characters of Moby Dick, two layers of which have 16 experts, top 2 and one shared. An arm is a
balancer and its rate; a seed fixes the initial weights and every batch, so that arms are compared in pairs. Measured:
validation loss; MaxVio of the last fifth of the batches and of the whole validation set; the step from which batches
stay balanced. Also: experts with normalised outputs (post 10699), and a dense model of equal active compute
(:mod:`benchmarks.experts_or_dense` compares these at equal time too).

Two floors stand beside a batch's MaxVio. *Random*: routing uniformly at random. *Text*: characters of one batch are
not independent, and the same character goes to the same experts, so its load varies more than at random; this floor
is the MaxVio of the same batches after every expert's load is divided by its own mean over them, what a router in
perfect balance on average would show.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.balance_rules import NEAR, longest_range
from benchmarks.claims import Claim, holds, table
from benchmarks.gpt import VALIDATION, text, vocabulary, windows
from benchmarks.plot import Line, draw, image
from benchmarks.study import BASE, one_thread, paired, plus_minus, spread
from quintic.core.counter_rng import Stream
from quintic.core.initial import initialize_
from quintic.core.machine import describe
from quintic.lm import LanguageModel, LMConfig
from quintic.moe import AuxLoss, LossFree, MoE, NoBalance, RouteRecorder, aux_loss, balance_step, sampling_floor
from quintic.moe.balance import RATES, Balance
from quintic.optim import OptimConfig, build_optimizer, lr_factor

FOLDER = Path("runs") / "benchmarks" / "balance"
"""Kept, so that a study that was stopped goes on; delete it to measure again."""
SEEDS = (0, 1, 2, 3, 4)
RULE_RATES = {
    "sign": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "rms": (1e-3, 3e-3, 1e-2, 3e-2),
    "floored-rms": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "quantile": (0.03, 0.1, 0.3, 1.0),
}
"""Around the rate that each has by default."""
AUX_WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)
BALANCED = 1.0
"""Batches count as balanced from the step on after which the mean MaxVio of every 10 steps stays below this."""
_SMOOTH = 10
_LATE = 0.8


@dataclass(frozen=True)
class Arm:
    """One training run."""

    balance: str = "none"
    """none, aux or a rule of LossFree."""
    rate: float = 0.0
    """Weight of the auxiliary loss, or rate of the rule."""
    seed: int = 0
    steps: int = 400
    batch: int = 16
    experts: int = 16
    top_k: int = 2
    lr: float = 0.01
    normalize: str = ""
    """Normalisation of the experts' outputs, e.g. rms."""
    dense: bool = False
    """Dense feed-forwards of the same active width instead of experts."""

    def make_balance(self) -> Balance:
        if self.balance == "none":
            return NoBalance()
        return AuxLoss(self.rate) if self.balance == "aux" else LossFree(self.balance, self.rate)


def build(arm: Arm) -> LanguageModel:
    layers, d_expert = 3, 32
    config = LMConfig(
        vocab_size=-(-len(vocabulary()) // 8) * 8, context=64, d_model=64, num_layers=layers,
        num_dense_layers=layers if arm.dense else 1, d_ff=(arm.top_k + 1) * d_expert, d_expert=d_expert,
        num_experts=arm.experts, top_k=arm.top_k,
    )  # fmt: skip
    model = LanguageModel(config, initialize=False)
    options: dict[str, Any] = {"normalize_experts": arm.normalize} if arm.normalize else {}
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = MoE(
                config.d_model, d_expert, arm.experts, arm.top_k, balance=arm.make_balance(),
                out_scale=(2 * layers) ** -0.5, **options,
            )  # fmt: skip
    initialize_(model, arm.seed)
    return model


@one_thread()
def train(arm: Arm) -> dict[str, Any]:
    """Train an arm; numbers of one run."""
    config = OptimConfig(**{**BASE, "lr": arm.lr})
    ids = text("moby")
    training, held_out = ids[:-VALIDATION], ids[-VALIDATION:]
    model = build(arm)
    optimizer, clipping = build_optimizer(model, config), config.make_clipping()
    context = model.config.context
    stream = Stream(arm.seed, "windows")
    starts = stream.integers(0, arm.steps * arm.batch, len(training) - context).reshape(arm.steps, arm.batch)
    loads, dead, began = [], [], time.perf_counter()
    for step in range(arm.steps):
        lr = config.lr * lr_factor(step, arm.steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = windows(training, starts[step], context)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) + aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        if not math.isfinite(float(clipping(model).norm)):
            return {"loss": math.inf}
        optimizer.step()
        stats = balance_step(model)
        loads.append([layer.load for layer in stats])
        dead.append(sum(layer.dead_experts for layer in stats))
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), **evaluate(model, held_out), **balance_numbers(np.array(loads), dead)}


@torch.no_grad()
def evaluate(model: LanguageModel, ids: Tensor) -> dict[str, Any]:
    """Validation loss in nats a character, global MaxVio and specialisation per layer."""
    model.eval()
    context = model.config.context
    starts = np.arange(0, len(ids) - context, context)
    total = 0.0
    with RouteRecorder(model, model.config.vocab_size) as recorder:
        for part in np.array_split(starts, math.ceil(len(starts) / 64)):
            batch = windows(ids, part, context)
            recorder.tokens = batch[:, :-1]
            logits = model(batch[:, :-1])
            total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())) * len(part)
    found = {"loss": total / len(starts)}
    if recorder.counts:
        found |= {"global_max_vio": recorder.max_violation, "specialisation": recorder.specialisation}
        found["dead_global"] = sum(int((counts == 0).sum()) for counts in recorder.counts)
    return found


def balance_numbers(loads: np.ndarray, dead: Sequence[int]) -> dict[str, Any]:
    """From (steps, layers, experts) shares: MaxVio over time, late, and its text floor; means over layers."""
    if not loads.size:
        return {}
    experts = loads.shape[2]
    vio = (loads.max(axis=2) * experts - 1.0).mean(axis=1)
    late = loads[int(_LATE * len(loads)) :]
    # An expert that was never chosen has no fluctuation to show.
    mean = np.maximum(late.mean(axis=0), 1e-9)
    text_floor = ((late / mean).max(axis=2) - 1.0).mean()
    smooth = np.convolve(vio, np.full(_SMOOTH, 1.0 / _SMOOTH), mode="valid")
    return {
        "max_vio": float(vio[int(_LATE * len(vio)) :].mean()),
        "text_floor": float(text_floor),
        "dead": float(np.mean(dead[int(_LATE * len(dead)) :])),
        "curve": [round(float(v), 4) for v in smooth],
    }


def balanced_from(curve: Sequence[float], limit: float = BALANCED) -> float:
    """The step from which a smoothed curve stays below a limit; infinite if it does not."""
    above = [i for i, value in enumerate(curve) if value >= limit]
    first = above[-1] + 1 if above else 0
    return float(first + _SMOOTH) if first < len(curve) else math.inf


class Book:
    """Outcomes by arm, one JSON line each; an arm that is not there yet is trained."""

    def __init__(self, folder: Path = FOLDER) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "arms.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._known = {json.dumps(row["arm"], sort_keys=True): row["outcome"] for row in map(json.loads, lines)}

    def __call__(self, arm: Arm) -> dict[str, Any]:
        default = asdict(Arm())
        facts = {name: value for name, value in asdict(arm).items() if value != default[name]}
        key = json.dumps(facts, sort_keys=True)
        if key not in self._known:
            outcome = train(arm)
            self._known[key] = outcome
            with self._path.open("a") as file:
                file.write(json.dumps({"arm": facts, "outcome": outcome}) + "\n")
            shown = {k: round(v, 4) for k, v in outcome.items() if isinstance(v, float)}
            print(f"  {key} {shown}", flush=True)
        return self._known[key]


def run(
    book: Callable[[Arm], dict[str, Any]] | None = None,
    base: Arm = Arm(),
    rules: Mapping[str, Sequence[float]] = RULE_RATES,
    weights: Sequence[float] = AUX_WEIGHTS,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    book = book or Book()
    swept = [("none", 0.0), *(("aux", weight) for weight in weights)]
    swept += [(rule, rate) for rule, rates in rules.items() for rate in rates]
    finalists = [("none", 0.0), *(("aux", weight) for weight in weights), *((rule, RATES[rule]) for rule in rules)]

    def outcomes(**fields: Any) -> dict[str, Any]:
        found = [book(replace(base, **fields, seed=seed)) for seed in seeds]
        facts = {"losses": [each["loss"] for each in found]}
        if "max_vio" in found[0]:
            for key in ("max_vio", "text_floor", "dead"):
                facts[key] = [each[key] for each in found]
            for key in ("global_max_vio", "specialisation"):
                facts[key] = [statistics.fmean(each[key]) for each in found]
            facts["balanced_from"] = [balanced_from(each["curve"]) for each in found]
            facts["curve"] = found[0]["curve"]
        return facts

    sweep = []
    for name, rate in swept:
        found = book(replace(base, balance=name, rate=rate, seed=seeds[0]))
        facts = {key: found.get(key, math.inf) for key in ("loss", "max_vio", "text_floor")}
        sweep.append({"balance": name, "rate": rate, **facts, "balanced_from": balanced_from(found.get("curve", []))})
    rule = LossFree().rule
    default = {"balance": rule, "rate": RATES[rule]}
    tokens = base.batch * 64
    return {
        "machine": describe(torch.device("cpu"), torch.float32),
        "seeds": list(seeds),
        **{key: value for key, value in asdict(base).items() if key in ("steps", "batch", "experts", "top_k", "lr")},
        "tokens": tokens,
        "floor": sampling_floor(tokens, base.experts, base.top_k),
        "global_floor": sampling_floor(VALIDATION, base.experts, base.top_k),
        "default": default,
        "sweep": sweep,
        "finalists": [{"balance": name, "rate": rate, **outcomes(balance=name, rate=rate)} for name, rate in finalists],
        "normalized": outcomes(**default, normalize="rms"),
        "dense": outcomes(dense=True),
    }


def name_of(arm: Mapping[str, Any]) -> str:
    return arm["balance"] if arm["balance"] == "none" else f"{arm['balance']} {arm['rate']:g}"


def comparable(result: dict) -> dict[str, Any]:
    """The auxiliary loss about as balanced as the default that has the least loss; else the most balanced one."""
    arms = result["finalists"]
    limit = 1.5 * statistics.fmean(default_of(result)["max_vio"])
    aux = [arm for arm in arms if arm["balance"] == "aux"]
    near = [arm for arm in aux if statistics.fmean(arm["max_vio"]) <= limit]
    if near:
        return min(near, key=lambda arm: statistics.fmean(arm["losses"]))
    return min(aux, key=lambda arm: statistics.fmean(arm["max_vio"]))


def default_of(result: dict) -> dict[str, Any]:
    return next(
        arm for arm in result["finalists"] if (arm["balance"], arm["rate"]) == tuple(result["default"].values())
    )


def _steps(values: Sequence[float], steps: int) -> str:
    middle = statistics.median(values)
    return f"{middle:.0f}" if math.isfinite(middle) else f"> {steps}"


def section(result: dict) -> str:
    none = result["finalists"][0]
    rows = []
    for arm in result["finalists"]:
        against = "" if arm is none else plus_minus(paired(arm["losses"], none["losses"]))
        rows.append((
            name_of(arm), plus_minus(spread(arm["losses"])), against, plus_minus(spread(arm["max_vio"]), 2),
            plus_minus(spread(arm["global_max_vio"]), 2), f"{statistics.fmean(arm['dead']):.1f}",
            plus_minus(spread(arm["specialisation"]), 2), _steps(arm["balanced_from"], result["steps"]),
        ))  # fmt: skip
    for name, arm in (("experts of unit RMS, default rule", result["normalized"]), ("dense", result["dense"])):
        against = plus_minus(paired(arm["losses"], none["losses"]))
        vio = plus_minus(spread(arm["max_vio"]), 2) if "max_vio" in arm else ""
        rows.append((name, plus_minus(spread(arm["losses"])), against, vio, *[""] * 4))
    head = ("balance", "validation loss", "difference to none", "MaxVio of late batches", "MaxVio of validation",
            "dead experts", "specialisation", f"balanced (below {BALANCED}) from step")  # fmt: skip
    gaps = {name_of(arm): paired(arm["losses"], none["losses"]) for arm in result["finalists"][1:]}
    worse, better = (
        ", ".join(name for name, gap in gaps.items() if sign * gap["mean"] > gap["half"]) or "none of them"
        for sign in (1.0, -1.0)
    )
    text_floor = statistics.fmean(default_of(result)["text_floor"])
    swept = [
        (name_of(arm), f"{arm['loss']:.3f}", f"{arm['max_vio']:.3f}", f"{arm['max_vio'] / result['floor']:.2f}",
         _steps([arm["balanced_from"]], result["steps"]))
        for arm in result["sweep"]
    ]  # fmt: skip
    return "\n\n".join([
        "## Balancing a mixture of experts",
        f"`python -m benchmarks balance`: {result['experts']} experts, top {result['top_k']}, characters of Moby Dick, "
        f"{result['steps']} steps of {result['tokens']} tokens,\n{len(result['seeds'])} seeds; losses in nats a "
        f"character. A batch routed at random has a MaxVio of {result['floor']:.3f}, this text in balance on average\n"
        f"one of {text_floor:.3f}, a validation set routed at random one of {result['global_floor']:.3f}.",
        table(head, rows),
        f"Beyond the noise, the loss is higher than without balancing for: {worse}. It is lower for: {better}.",
        image("balance-time", "MaxVio over the steps"),
        "Rates and weights, one seed:",
        table(("balance", "validation loss", "MaxVio of late batches", "in random floors", "balanced from"), swept),
        image("balance-loss", "Validation loss against MaxVio"),
    ])  # fmt: skip


def plots(result: dict) -> dict[str, str]:
    shown = [arm for arm in result["finalists"] if arm["balance"] != "aux"] + [comparable(result)]
    steps = [i + _SMOOTH for i in range(len(shown[0]["curve"]))]
    names = dict.fromkeys(arm["balance"] for arm in result["sweep"])
    by_name = {name: [arm for arm in result["sweep"] if arm["balance"] == name] for name in names}
    return {
        "balance-time": draw(
            "MaxVio of a batch over the training, mean of layers and ten steps, first seed",
            [Line(name_of(arm), steps, arm["curve"]) for arm in shown],
            x="step", y="MaxVio", log_y=True, marks=False, rules={"random": result["floor"]},
        ),
        "balance-loss": draw(
            "Validation loss against balance, one point per rate or weight, first seed",
            [Line(name, [a["max_vio"] for a in arms], [a["loss"] for a in arms]) for name, arms in by_name.items()],
            x="MaxVio of late batches", y="nats a character", log_x=True,
        ),
    }  # fmt: skip


def claims(result: dict) -> list[Claim]:
    n, default, aux = len(result["seeds"]), default_of(result), comparable(result)
    name, floor = name_of(default), result["floor"]
    ratio = spread([vio / floor for vio in default["max_vio"]])
    text_ratio = spread([vio / low for vio, low in zip(default["max_vio"], default["text_floor"], strict=True)])
    loss = paired(default["losses"], aux["losses"])
    swept = [(arm["rate"], arm["max_vio"] / floor) for arm in result["sweep"] if arm["balance"] == default["balance"]]
    low, high = longest_range(swept)
    sign = next(arm for arm in result["finalists"] if arm["balance"] == "sign")
    soon, late = (statistics.median(arm["balanced_from"]) for arm in (default, sign))
    none = paired(default["losses"], result["finalists"][0]["losses"])
    unit = paired(result["normalized"]["losses"], default["losses"])
    at_least = "" if math.isfinite(late) else "at least "
    times = (late if math.isfinite(late) else result["steps"]) / soon
    source, command = "posts 10735 and 10757", "balance"
    yes = {True: "yes", False: "no"}
    return [
        Claim(f"{name} ends within {NEAR} of the floor that random routing sets", "ours",
              f"{plus_minus(ratio, 2)} of the random floor, {plus_minus(text_ratio, 2)} of the text's", n,
              yes[ratio["mean"] <= NEAR], command),
        Claim(f"{name} costs no loss against the best auxiliary loss of comparable balance ({name_of(aux)})", source,
              f"{plus_minus(loss)} nats", n, yes[loss["mean"] - loss["half"] <= 0], command),
        Claim(f"{default['balance']} works over a 30-fold range of its rate", "ours",
              f"within {NEAR} of the random floor from {low:g} to {high:g}", 1,
              yes[low > 0 and high / low >= 30], command),
        Claim(f"{name} balances three times sooner than {name_of(sign)}", "ours",
              f"{at_least}{times:.1f} times: step {soon:.0f} against {_steps(sign['balanced_from'], result['steps'])}",
              n,              yes[times >= 3], command),
        Claim("Balancing costs nothing at this size", source, f"{name} against none {plus_minus(none)} nats", n,
              {"yes": "yes: better", "no": "no: unbalanced is better"}.get(holds(none["mean"], none["half"]),
                                                                         "undecided: within the noise"), command),
        Claim("Normalised experts make no difference", "post 10699", f"{plus_minus(unit)} nats", n,
              yes[abs(unit["mean"]) <= unit["half"]], command),
    ]  # fmt: skip
