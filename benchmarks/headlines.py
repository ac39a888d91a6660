"""What to read first: the head of RESULTS.md, made from the same results and claims as everything below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import CLAIMS, Claim, slug, table
from benchmarks.muon_race import share_words
from benchmarks.study import paired, plus_minus, spread
from benchmarks.tarflow_sampling import _ratio as sampling_ratio

Result = Mapping[str, Any]


def headlines(results: Mapping[str, Result]) -> list[tuple[str, str, str]]:
    """(question, answer, benchmark), of those that have a result: what is better here and what is worse."""
    return [(question, answer(results[name]), name) for question, name, answer in _HEADLINES if name in results]


def _demo(result: Result) -> str:
    bits, seconds, memory = (
        [run[key] for run in result["runs"]] for key in ("test_bits_per_byte", "wall_seconds", "peak_memory_mb")
    )
    return (
        f"{min(bits):.2f} to {max(bits):.2f} bits per byte of unseen text after {max(seconds):.0f} s on "
        f"{result['machine']['threads']} cores, in at most {max(memory)} MiB"
    )


def _race(result: Result) -> str:
    sizes = list(result["sizes"].values())
    steps = " and ".join(share_words(r, 1.0) for r in sizes)
    times = " and ".join(share_words(r, r["step_seconds"]["muon"] / r["step_seconds"]["adamw"]) for r in sizes)
    return f"AdamW's final loss in {steps} of its steps, {times} of its time"


def _equal_time(result: Result) -> str:
    found = (r["difference"] for r in result["sizes"].values())
    return "loss " + " and ".join(
        plus_minus(d) + (" (within the noise)" if abs(d["mean"]) <= d["half"] else "") for d in found
    ) + " nats a character against AdamW"  # fmt: skip


def _balance(result: Result) -> str:
    of = {(arm["balance"], arm["rate"]): arm for arm in result["finalists"]}
    ours, none = of[result["default"]["balance"], result["default"]["rate"]], of["none", 0.0]
    vio, before = float(np.mean(ours["max_vio"])), float(np.mean(none["max_vio"]))
    return (
        f"the busiest expert gets {vio:.0%} more than its share (unbalanced {before:.0%}, random routing "
        f"{result['floor']:.0%}); loss {plus_minus(paired(ours['losses'], none['losses']))} nats against unbalanced"
    )


def _dense(result: Result) -> str:
    arms = result["arms"]
    steps, time = (paired(arms["experts"]["losses"], arms[other]["losses"]) for other in ("dense", "dense, equal time"))
    return f"{plus_minus(steps)} nats after as many steps, but {plus_minus(time)} in equal time: dense is ahead there"


def _transformers(result: Result) -> str:
    others = ("eager", "batched_mm", "grouped_mm")
    faster = [speed["quintic"] / max(speed[o] for o in others) for speed in result["tokens_per_second"].values()]
    step = min(result["step_ms"][o] for o in others) / result["step_ms"]["quintic"]
    return (
        f"generates {min(faster):.1f} to {max(faster):.1f} times as fast; a training step is {step:.2f} times as fast"
    )


def _muon_step(result: Result) -> str:
    def span(lists: Mapping[str, Result]) -> str:
        ratios = [times["torch"] / times["quintic"] for times in lists.values()]
        return f"{min(ratios):.1f} to {max(ratios):.1f} times"

    return (
        f"{span(result['avx2_steps'])} as fast without bfloat16 instructions, {span(result['steps'])} with them: "
        "there torch, which multiplies in bfloat16, is ahead on large matrices"
    )


def _sampling(result: Result) -> str:
    ratios = [min(sampling_ratio(case, "planned"), sampling_ratio(case, "planned", "wall")) for case in result["cases"]]
    return f"{min(ratios):.1f} to {max(ratios):.1f} times as fast, by batch, length and guidance"


def _likelihood(result: Result) -> str:
    arms = result["sets"]["fashion-mnist"]

    def bits(arm: str) -> str:
        return plus_minus(spread(arms[arm]["bits_per_dim"]))

    return (
        f"plain {bits('TARFLOW, Muon')}, Glow {bits('Glow (normflows)')}; with splines and number by number "
        f"{bits('TARFLOW with splines, number by number, Muon, sizes chosen')}, Glow behind a spline "
        f"{bits('Glow (normflows) behind a spline, sizes chosen')}"
    )


def _codec(result: Result) -> str:
    f = result["models"]["emoji32"]["files"]
    return (
        f"{np.mean(f['network']):.1f} dB in {f['network_bytes']:.0f} bytes; the smallest WebP has "
        f"{np.mean(f['webp']):.1f} dB in {f['webp_bytes']:.0f}"
    )


def _photographs(result: Result) -> str:
    size, webp, own = np.mean(result["photographs"], axis=0)
    return f"{own:.1f} dB where WebP has {webp:.1f} in as many bytes ({size:.0f}): use WebP"


def _interpolative(result: Result) -> str:
    theirs, fast, quality = (result["times"][name] for name in ("scipy, float64", "fast, float64", "quality, float64"))
    return " and ".join(
        f"`{rule}` {theirs['seconds'] / r['seconds']:.1f} times as fast at {r['ratio'] / theirs['ratio']:.2f} of its "
        "error"
        for rule, r in (("fast", fast), ("quality", quality))
    )


_HEADLINES: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("The demo, a language model of 1.9 million parameters", "demo", _demo),
    ("Muon beside AdamW, rates of both tuned, GPTs of two sizes", "muon_race", _race),
    ("The same in equal time, batch and width of both tuned too", "equal_time", _equal_time),
    ("Generation and training beside transformers' DeepSeek-V3, same weights", "beside_transformers", _transformers),
    ("Loss-free balance of 16 experts", "balance", _balance),
    ("Experts beside a dense model of the same active width", "experts_or_dense", _dense),
    ("A step of Muon beside `torch.optim.Muon`, by list of matrices", "muon_speed", _muon_step),
    ("Exact samples of a TARFLOW beside apple/ml-tarflow", "tarflow_sampling", _sampling),
    ("Bits per dimension of Fashion-MNIST in equal time", "tarflow_likelihood", _likelihood),
    ("Unseen emoji of 32 x 32 pixels in a file of the codec", "codec", _codec),
    ("Grey photographs of 128 x 128 pixels in a file of the codec", "codec", _photographs),
    ("Interpolative decomposition, 4000 x 4000, beside SciPy's", "lowrank", _interpolative),
)


def summary_section(results: Mapping[str, Result], claims: Sequence[Claim]) -> str:
    """The head: what was found, what did not hold, and how many claims there are of each kind."""
    kinds = Counter(claim.verdict for claim in claims)
    missed, undecided = ([claim for claim in claims if claim.verdict == kind] for kind in ("no", "undecided"))
    rows = [(claim.claim, claim.measured, f"`{claim.command}`") for claim in missed]
    return "\n\n".join([
        "## In short",
        "Small models, trained for minutes on two cores of a CPU: signs that things work, not laws. The number after "
        "\u00b1 is half\nof a 95 % interval over seeds. `python -m benchmarks NAME` measures a row again.",
        table(("", "measured", "benchmark"), [(q, answer, f"`{name}`") for q, answer, name in headlines(results)]),
        f"We checked {len(claims)} claims: those of posts and papers, and bars that we set ourselves. {kinds['yes']} "
        f"hold here, {kinds['no']} do not, and\n{kinds['undecided']} are within the noise. "
        f"[All of them](#{slug(CLAIMS)}).",
        "### What did not hold, or missed its bar",
        table(("claim or bar", "measured", "benchmark"), rows),
        "### What the noise leaves open",
        "\n".join(f"* {claim.claim}: {claim.measured} (`{claim.command}`)" for claim in undecided),
    ])  # fmt: skip


def contents(sections: Sequence[str]) -> str:
    """Links to sections, by their headings."""
    titles = [section.split("\n", 1)[0].removeprefix("## ") for section in sections]
    return "Sections: " + " \u00b7\n".join(f"[{title}](#{slug(title)})" for title in titles)
