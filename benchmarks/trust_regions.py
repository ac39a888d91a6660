"""Other trust regions than Muon's (post 10739): Schatten norms between msign and the normalised gradient, and no Adam.

Muon is steepest descent under the spectral norm (p = infinity); p = 2 is the normalised gradient. All matrices'
updates are scaled to one RMS, so that the norms differ by direction alone, and every arm has its rate swept. The last
arms update what is not a matrix by the same principle: gains by their sign or their length, embedding rows by their
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.claims import Claim, holds, table
from benchmarks.plot import Line, draw, image
from benchmarks.study import SEEDS, Book, Run, paired, plus_minus, race, spread

BASE = Run(steps=400)
START = (0.016, 0.032)
ARMS: dict[str, dict[str, Any]] = {
    "p = 2": {"optim": {"norm": "schatten:2", "scale": "rms"}},
    "p = 4": {"optim": {"norm": "schatten:4", "scale": "rms"}},
    "p = 16": {"optim": {"norm": "schatten:16", "scale": "rms"}},
    "p = infinity (Muon)": {"optim": {"scale": "rms"}},
    "Muon, gains by sign, rows by length": {"optim": {"scale": "rms", "vectors": "sign", "embeddings": "row-l2"}},
    "Muon, gains and rows by length": {"optim": {"scale": "rms", "vectors": "l2", "embeddings": "row-l2"}},
    "AdamW": {"optim": {"name": "adamw"}},
}
MUON = "p = infinity (Muon)"


def run(
    book: Book | None = None, base: Run = BASE, start: Sequence[float] = START, seeds: Sequence[int] = SEEDS
) -> dict:
    book = book or Book("trust_regions")
    arms = race(book, base, ARMS, start, seeds).to_json()["arms"]
    muon = next(arm for arm in arms if arm["name"] == MUON)
    for arm in arms:
        arm["against_muon"] = paired(arm["losses"], muon["losses"])
    return {"seeds": list(seeds), "steps": base.steps, "arms": arms}


def section(result: dict) -> str:
    rows = [
        (arm["name"], f"{arm['best_lr']:g} ({'yes' if arm['interior'] else 'no'})", plus_minus(spread(arm["losses"])),
         plus_minus(arm["against_muon"]))
        for arm in result["arms"]
    ]  # fmt: skip
    return "\n\n".join([
        "## Other trust regions: Schatten norms, and a model without Adam",
        f"`python -m benchmarks trust_regions`: small size, {result['steps']} steps, {len(result['seeds'])} seeds, "
        "rates swept for every arm,\nevery update of a matrix scaled to the same RMS.",
        table(("arm", "best rate (interior)", "loss", "difference to Muon"), rows),
        image("trust-regions", "Loss over the learning rate by trust region"),
    ])  # fmt: skip


def plots(result: dict) -> dict[str, str]:
    lines = []
    for arm in result["arms"]:
        if arm["name"].startswith("p = "):
            points = sorted((float(lr), loss) for lr, loss in arm["sweep"].items())
            lines.append(Line(arm["name"], [lr for lr, _ in points], [loss for _, loss in points]))
    title = "Loss by learning rate and Schatten norm, first seed"
    return {"trust-regions": draw(title, lines, x="learning rate", y="nats a character", log_x=True)}


def claims(result: dict) -> list[Claim]:
    arms = {arm["name"]: arm for arm in result["arms"]}
    n = len(result["seeds"])
    plain = arms["p = 2"]["against_muon"]
    best = min(
        (arm for name, arm in arms.items() if name.startswith("p = ") and name not in (MUON, "p = 2")),
        key=lambda arm: arm["mean"],
    )
    free = min((arm for name, arm in arms.items() if "rows" in name), key=lambda arm: arm["mean"])
    against_adamw = paired(free["losses"], arms["AdamW"]["losses"])
    return [
        Claim("msign is better than the normalised gradient (Schatten 2)", "post 10592",
              f"p = 2: {plus_minus(plain)} against Muon", n,
              holds(-plain["mean"], plain["half"]), "trust_regions"),
        Claim("A Schatten norm between 2 and infinity is better than Muon's", "post 10739, as a question",
              f"{best['name']}: {plus_minus(best['against_muon'])} against Muon", n,
              holds(best["against_muon"]["mean"], best["against_muon"]["half"]), "trust_regions"),
        Claim("A whole model can be trained without Adam", "Moonlight, as an open direction",
              f"{free['name']}: {plus_minus(free['against_muon'])} against Muon with AdamW for the rest, "
              f"{plus_minus(against_adamw)} against AdamW", n,
              holds(against_adamw["mean"], against_adamw["half"]), "trust_regions"),
    ]  # fmt: skip
