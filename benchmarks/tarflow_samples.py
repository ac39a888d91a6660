"""What denoising and guidance do to the samples of a flow, measured and to be looked at.

Two flows: the shipped one of Fashion-MNIST, and one of emoji that is trained here by ``quintic train`` (a quarter of an
hour on one core). Frechet distance to test images in the features of an own classifier (:mod:`benchmarks.classifier`),
and the share of samples that it takes for the class asked for; classes are as frequent as among the training images.
All samples begin from the same latents. The published sampler denoises by one step of the score at the training noise;
here with and without. Sheets of samples go to ``benchmarks/plots``.

The flow in training and each arm leave files under ``runs/benchmarks/tarflow_samples``: a study that was stopped goes
on, and a flow whose run was stopped is resumed.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.claims import Claim, table
from benchmarks.classifier import Classifier, classifier, frechet
from benchmarks.codec_parts import images, some
from benchmarks.fetch_data import fetch
from benchmarks.study import one_thread
from quintic.cli.wiring import load_run_model
from quintic.core.files import atomic_write
from quintic.core.machine import describe
from quintic.data.images import ImageData, as_pixels, as_signed
from quintic.flow import Guidance, TarFlow, shipped_flow

FOLDER = Path("runs") / "benchmarks" / "tarflow_samples"
PLOTS = Path(__file__).parent / "plots"
SETS = {"fashion28": "Fashion-MNIST", "emoji32": "emoji at 32 pixels"}
TRAINING = (
    "--task", "tarflow", "--size", "laptop", "--dtype", "float32", "data.size=32", "data.channels=rgb",
    "data.flip=true", "tarflow.width=96", "engine.steps=4000", "engine.ema_decay=0.998",
)  # fmt: skip
"""Of the flow of emoji."""
SAMPLES, TEST_IMAGES, SHOWN = 1000, 2000, 10
ARMS: dict[str, tuple[bool, float]] = {
    "with its noise": (False, 0.0),
    "denoised": (True, 0.0),
    "denoised, guidance 0.5": (True, 0.5),
    "denoised, guidance 1": (True, 1.0),
    "denoised, guidance 2": (True, 2.0),
    "with its noise, guidance 1": (False, 1.0),
}
"""Title: denoise, guidance."""
TRUE = "training images"
SEEN = {
    "fashion28": "every image is the garment that was asked for. With its noise the ground is specked and the cloth "
    "grainy; denoised, the ground is black and plain cloth smooth, and outlines stay where they were. Guidance makes "
    "cloth plainer and shapes more usual (the faint trousers of the second column become plain ones); the printed "
    "dress is a muddle in every row.",
    "emoji32": "people as busts with a face are plain to see, four of these ten; the rest are blots in the colours of "
    "emoji that one could not name, on a white ground. Denoising takes specks away and changes nothing else; guidance "
    "draws faces clearer and makes blots darker. A flow of this size learns little from 3,125 pictures in a quarter of "
    "an hour.",
}
"""What one sees on the sheets; to be written after looking."""


def flow_of(name: str) -> TarFlow:
    """The shipped flow of a set, or the one trained here."""
    if name == "fashion28":
        return shipped_flow(name)
    run = FOLDER / name
    started = (run / "checkpoints").is_dir()
    command = ("resume", str(run)) if started else ("train", str(fetch("emoji")), "--out", str(run), *TRAINING)
    subprocess.run([sys.executable, "-m", "quintic", *command], check=True)
    return cast("TarFlow", load_run_model(run, "best", "cpu", "float32").model)


def judged(net: Classifier, signed: NDArray[np.float32], labels: NDArray[np.int64], test: Any) -> dict[str, float]:
    """Distance to the features of test images, and how often the classifier agrees."""
    return {
        "frechet": frechet(net.features(signed), test),
        "right": float((net.labels(signed) == labels).mean()),
    }


def one(name: str, data: ImageData, samples: int) -> dict[str, dict[str, float]]:
    """All arms of a set; writes its sheet."""
    folder = FOLDER / f"{name}-{samples}"
    folder.mkdir(parents=True, exist_ok=True)
    net, flow = classifier(data, folder / "classifier.pt"), flow_of(name)
    test = net.features(as_signed(some(data, TEST_IMAGES)))
    assert data.train.labels is not None
    evenly = np.arange(samples) * len(data.train) // samples
    true, labels = data.train.images[evenly], data.train.labels[evenly]
    shown = np.sort(np.random.default_rng(0).permutation(len(labels))[:SHOWN])
    shown = shown[np.argsort(labels[shown], kind="stable")]
    found, sheet = {}, []
    for title, (denoise, strength) in ARMS.items():
        kept = folder / f"{title.replace(', ', '-').replace(' ', '-')}.npz"
        if not kept.exists():
            made = flow.sample(
                len(labels), torch.from_numpy(labels), seed=0, guidance=Guidance(strength) if strength else None,
                denoise=denoise, method="sequential",
            ).images  # fmt: skip
            packed = io.BytesIO()
            np.savez(packed, images=made.clamp(-1, 1).numpy())
            atomic_write(kept, packed.getvalue())
        signed = np.load(kept)["images"]
        found[title] = judged(net, signed, labels, test)
        sheet.append(as_pixels(signed[shown]))
        print(name, title, found[title], flush=True)
    signed = as_signed(true)
    found[TRUE] = judged(net, signed, labels, test)
    noise = flow.sigma * np.random.default_rng(0).standard_normal(signed.shape).astype(np.float32)
    found[f"{TRUE}, noise of {flow.sigma:g}"] = judged(net, (signed + noise).clip(-1, 1), labels, test)
    _write_sheet(name, [*sheet, true[shown]])
    return found


def _write_sheet(name: str, rows: list[NDArray[np.uint8]]) -> None:
    """A row per arm, the true images below, magnified twice."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0).repeat(2, 0).repeat(2, 1)
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet).save(file, "PNG", optimize=True)
    atomic_write(PLOTS / f"tarflow-samples-{name}.png", file.getvalue())


def run(samples: int = SAMPLES) -> dict[str, Any]:
    with one_thread():
        found = {name: one(name, images(name), samples) for name in SETS}
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, "seed": 0, "samples": samples, "sets": found}


def section(result: dict[str, Any]) -> str:
    parts = [
        "## TARFLOW: samples",
        f"`python -m benchmarks tarflow_samples`. {result['samples']:,} samples from the same latents, of classes as "
        "frequent as in training. Frechet distance to test images in the features of an own classifier (not "
        "comparable with anybody's FID, nor between the two sets), and how often that classifier sees the class asked "
        "for. Fashion-MNIST: the shipped flow; emoji: a smaller one, trained by the study for a quarter of an hour.",
    ]
    for name, arms in result["sets"].items():
        rows = [(title, f"{row['frechet']:.1f}", f"{row['right']:.1%}") for title, row in arms.items()]
        parts += [
            f"**{SETS[name]}**",
            table(("images", "Frechet distance", "class as asked"), rows),
            f"![Samples of the flow of {SETS[name]}](benchmarks/plots/tarflow-samples-{name}.png)",
            f"From above: {'; '.join(ARMS)}; {TRUE}. Not cherry-picked. What one sees: {SEEN[name]}",
        ]
    return "\n\n".join(parts)


def claims(result: dict[str, Any]) -> list[Claim]:
    made = []
    for name, arms in result["sets"].items():
        raw, clean, guided = (arms[title] for title in ("with its noise", "denoised", "denoised, guidance 1"))
        for words, a, b in (
            ("denoising after sampling brings a TARFLOW's samples nearer to images (Frechet)", clean, raw),
            ("guidance 1 brings them nearer still", guided, clean),
        ):
            measured = f"{a['frechet']:.1f} against {b['frechet']:.1f}"
            verdict = "yes" if a["frechet"] < b["frechet"] else "no"
            made.append(Claim(f"{SETS[name]}: {words}", "post 10667", measured, 1, verdict, "tarflow_samples"))
    return made
