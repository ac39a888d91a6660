"""What denoising and guidance do to the samples of the shipped flow of Fashion-MNIST, measured and to be looked at.

Frechet distance to test images in the features of an own classifier (:mod:`benchmarks.classifier`), and the share of
samples that it takes for the class asked for. All samples begin from the same latents. The published sampler denoises
by one step of the score at the training noise; here with and without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.claims import Claim, table
from benchmarks.classifier import classifier, frechet
from benchmarks.codec import FOLDER as CLASSIFIER_FOLDER
from benchmarks.codec_parts import images, some
from benchmarks.study import one_thread
from quintic.core.machine import describe
from quintic.data.images import as_signed
from quintic.flow import Guidance, shipped_flow

NAME = "fashion28"
SAMPLES = 1000
ARMS: dict[str, tuple[bool, float]] = {
    "with its noise": (False, 0.0),
    "denoised": (True, 0.0),
    "denoised, guidance 0.5": (True, 0.5),
    "denoised, guidance 1": (True, 1.0),
    "denoised, guidance 2": (True, 2.0),
    "with its noise, guidance 1": (False, 1.0),
}
"""Title: denoise, guidance."""


def run(samples: int = SAMPLES) -> dict[str, Any]:
    data, flow = images(NAME), shipped_flow(NAME)
    CLASSIFIER_FOLDER.mkdir(parents=True, exist_ok=True)
    net = classifier(data, CLASSIFIER_FOLDER / "classifier.pt")
    true = net.features(as_signed(some(data, 2000)))
    labels, found = torch.arange(samples) % 10, {}
    with one_thread():
        for title, (denoise, strength) in ARMS.items():
            guidance = Guidance(strength) if strength else None
            made = flow.sample(samples, labels, seed=0, guidance=guidance, denoise=denoise).images.clamp(-1, 1).numpy()
            found[title] = {
                "frechet": frechet(net.features(made), true),
                "right": float((net.labels(made) == labels.numpy()).mean()),
            }
            print(title, found[title], flush=True)
    test = as_signed(data.test.images[1 :: len(data.test) // samples][:samples])
    chosen = data.test.labels[1 :: len(data.test) // samples][:samples]
    found["other test images"] = {
        "frechet": frechet(net.features(test), true),
        "right": float((net.labels(test) == chosen).mean()),
    }
    noisy = test + 0.1 * np.random.default_rng(0).standard_normal(test.shape).astype(np.float32)
    found["other test images, noise of 0.1"] = {
        "frechet": frechet(net.features(noisy.clip(-1, 1)), true),
        "right": float((net.labels(noisy.clip(-1, 1)) == chosen).mean()),
    }
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, "seed": 0, "samples": samples, "arms": found}


def section(result: dict[str, Any]) -> str:
    rows = [(title, f"{row['frechet']:.1f}", f"{row['right']:.1%}") for title, row in result["arms"].items()]
    return "\n\n".join([
        "## TARFLOW: samples",
        f"`python -m benchmarks tarflow_samples`. The shipped flow of Fashion-MNIST, {result['samples']} samples of "
        "ten classes from the same latents. Frechet distance to 2,000 test images in the features of an own classifier "
        "(not comparable with anybody's FID), and how often that classifier sees the class asked for.",
        table(("samples", "Frechet distance", "class as asked"), rows),
    ])  # fmt: skip


def claims(result: dict[str, Any]) -> list[Claim]:
    arms = result["arms"]
    raw, clean, guided = (arms[title] for title in ("with its noise", "denoised", "denoised, guidance 1"))

    def claim(words: str, a: dict[str, float], b: dict[str, float]) -> Claim:
        measured = f"{a['frechet']:.1f} against {b['frechet']:.1f}"
        return Claim(
            words, "post 10667", measured, 1, "yes" if a["frechet"] < b["frechet"] else "no", "tarflow_samples"
        )

    return [
        claim("denoising after sampling brings a TARFLOW's samples nearer to images (Frechet)", clean, raw),
        claim("guidance 1 brings them nearer still", guided, clean),
    ]
