"""Run benchmarks by name, all without one, and collect their results."""

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = ("demo", "optimizers")


def collect() -> None:
    """Rewrite RESULTS.md: the section of each benchmark that has a result."""
    parts = [
        "# Results\n\nWritten by `python -m benchmarks` from `benchmarks/results/*.json`; do not edit by hand.\n"
        "Timings are of the machine named beside them."
    ]
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            module = importlib.import_module(f"benchmarks.{name}")
            parts.append(module.section(json.loads(path.read_text(encoding="utf-8"))))
    (HERE.parent / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    arguments = sys.argv[1:]
    names = [a for a in arguments if not a.startswith("-")] or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"unknown benchmark {', '.join(unknown)}; expected one of {', '.join(BENCHMARKS)}")
    if "--collect" not in arguments:
        for name in names:
            print(f"== {name}", flush=True)
            result = importlib.import_module(f"benchmarks.{name}").run()
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    collect()


if __name__ == "__main__":
    main()
