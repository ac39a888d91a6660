"""Run benchmarks by name, the quick ones without a name, all of them with --all, and collect their results."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import quintic
from benchmarks.claims import claims_section, provenance_section
from benchmarks.headlines import contents, summary_section
from quintic.core.machine import describe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLOTS = HERE / "plots"
BENCHMARKS = (
    "demo", "beside_transformers", "step_floor", "two_processes", "memory", "formulas", "muon_race", "equal_time",
    "optimizers", "scale", "trust_regions", "overfitting", "clipping", "sizes", "finetuning", "muon_speed", "balance",
    "balance_rules", "experts_or_dense", "moe_speed", "tarflow_sampling", "tarflow_likelihood", "tarflow_samples",
    "diffusion", "codec", "lowrank", "retrieval", "nystrom_attention", "compression",
)  # fmt: skip
"""In the order of RESULTS.md."""
QUICK = ("demo", "formulas", "muon_speed", "moe_speed", "balance_rules", "lowrank", "tarflow_sampling")
"""What runs if nothing is named: about 20 minutes on two cores. The others are studies of up to an hour each."""


def stamped(result: dict[str, Any], module: ModuleType) -> dict[str, Any]:
    """A result with what belongs beside any number: version, machine and seeds, unless it says them itself."""
    seeds = result.get("seeds", [result["seed"]] if "seed" in result else getattr(module, "SEEDS", (0,)))
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, **result, "version": quintic.__version__, "seeds": list(seeds)}


def written() -> tuple[str, dict[str, str]]:
    """The text of RESULTS.md (the head, the claims, a section of each benchmark with a result), and plots by name."""
    claims, sections, results, drawn = [], [], {}, {}
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        result = results[name] = json.loads(path.read_text(encoding="utf-8"))
        module = importlib.import_module(f"benchmarks.{name}")
        sections.append(module.section(result))
        if hasattr(module, "claims"):
            claims += module.claims(result)
        if hasattr(module, "plots"):
            drawn |= module.plots(result)
    sections = [claims_section(claims), *sections, provenance_section(results)]
    head = (
        "# Results\n\nWritten by `python -m benchmarks` from `benchmarks/results/*.json`; do not edit by hand.\n"
        "`python -m benchmarks NAME` measures one of them again. Versions, seeds and machines stand at the end."
    )
    parts = [head, summary_section(results, claims), contents(sections), *sections]
    return "\n\n".join(parts) + "\n", drawn


def collect() -> None:
    """Rewrite RESULTS.md, its plots and its copies."""
    text, drawn = written()
    PLOTS.mkdir(exist_ok=True)
    for name, svg in drawn.items():
        (PLOTS / f"{name}.svg").write_text(svg, encoding="utf-8")
    (HERE.parent / "RESULTS.md").write_text(text, encoding="utf-8")
    importlib.import_module("docs.figures.results").main()  # the pages of the documentation show the same tables


def main() -> None:
    arguments = sys.argv[1:]
    names = [a for a in arguments if not a.startswith("-")] or list(BENCHMARKS if "--all" in arguments else QUICK)
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; expected one of {', '.join(BENCHMARKS)}")
    if unknown := {a for a in arguments if a.startswith("-")} - {"--collect", "--all"}:
        sys.exit(f"unknown option {', '.join(sorted(unknown))}; expected --collect or --all")
    if "--collect" not in arguments:
        for name in names:
            print(f"== {name}", flush=True)
            module = importlib.import_module(f"benchmarks.{name}")
            result = stamped(module.run(), module)
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    collect()


if __name__ == "__main__":
    main()
