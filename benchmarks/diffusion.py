"""What training buys a denoiser: the shipped network against the exact Gaussian one, on images neither has seen.

At each noise level their squared errors; by dI/dsnr = mse / 2 the bits a coder that owns the denoiser would have to
send until then (an ideal one: the codec's own files are longer); and from both the quality at equal information.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from benchmarks.claims import Claim, table
from benchmarks.fetch_data import fetch
from benchmarks.plot import Line, draw, image
from quintic.core.machine import describe
from quintic.data.images import ImageConfig, as_signed, prepare_images
from quintic.diffusion import ErrorCurve, GaussianDenoiser, measure_errors, shipped_denoiser, shipped_names

SETS = {"fashion28": ("fashion-mnist", ImageConfig()), "emoji32": ("emoji", ImageConfig(size=32, channels="rgb"))}
LEVELS = [level / 2 for level in range(-16, 21)]
IMAGES = 400
BYTES = (20, 40, 60, 80, 120, 160)
RANK = 1500
"""Components of the Gaussian for colour images, of 3072."""


def quality(curve: ErrorCurve, size: float) -> float:
    """PSNR in dB when so many bytes of information have been had."""
    fine = np.linspace(LEVELS[0], LEVELS[-1], 1000)
    bits = [curve.information(level) / math.log(2) for level in fine]
    level = float(np.interp(8 * size, bits, fine))
    return 10 * math.log10(4.0 / curve.mmse(level))


def one(name: str, images: int = IMAGES) -> dict[str, Any]:
    """Curves of a shipped model and of the Gaussian fitted to the same training images."""
    folder, config = SETS[name]
    data = prepare_images([fetch(folder)], config)
    test = torch.from_numpy(as_signed(data.test.images[:: max(1, len(data.test) // images)][:images]))
    train = torch.from_numpy(as_signed(data.train.images))
    rank = None if math.prod(data.shape) <= RANK else RANK
    found: dict[str, Any] = {"images": len(test), "values": math.prod(data.shape), "levels": LEVELS}
    for kind, denoiser in (("network", shipped_denoiser(name)), ("gaussian", GaussianDenoiser.fit(train, rank))):
        curve = measure_errors(denoiser, test, LEVELS)
        found[kind] = {
            "errors": list(curve.errors),
            "bits_per_value": [curve.information(v) / math.log(2) / curve.values for v in LEVELS],
            "psnr": {str(size): quality(curve, size) for size in BYTES},
        }
    return found


def run() -> dict[str, Any]:
    machine = describe(torch.device("cpu"), torch.float32)
    return {"machine": machine, "seed": 0, "models": {name: one(name) for name in SETS if name in shipped_names()}}


def section(result: dict[str, Any]) -> str:
    parts = [
        "## Denoisers\n\nThe shipped networks and the exact Gaussian denoiser (principal components of the same "
        "training images), on test images. Bits follow from the errors by the I-MMSE formula: what an ideal coder "
        "would send."
    ]
    for name, found in result["models"].items():
        network, gaussian = found["network"], found["gaussian"]
        rows = [
            (f"{size} bytes", f"{network['psnr'][size]:.1f} dB", f"{gaussian['psnr'][size]:.1f} dB",
             f"{network['psnr'][size] - gaussian['psnr'][size]:+.1f} dB")
            for size in map(str, BYTES)
        ]  # fmt: skip
        parts.append(
            f"**{name}**, {found['images']} test images\n\n"
            + table(("information", "network", "Gaussian", "gain"), rows)
            + "\n\n"
            + image(f"diffusion_{name}", f"Quality against information, {name}")
        )
    return "\n\n".join(parts)


def claims(result: dict[str, Any]) -> list[Claim]:
    made = []
    for name, found in result["models"].items():
        gains = [found["network"]["psnr"][str(size)] - found["gaussian"]["psnr"][str(size)] for size in BYTES]
        made.append(
            Claim(
                f"{name}: the trained denoiser is 1.5 dB or more above the Gaussian one at equal information, 20-160 B",
                "ours",
                f"{min(gains):+.1f} to {max(gains):+.1f} dB",
                0,
                "yes" if min(gains) >= 1.5 else "no",
                "diffusion",
            )
        )
    return made


def plots(result: dict[str, Any]) -> dict[str, str]:
    return {
        f"diffusion_{name}": draw(
            f"{name}: quality against information",
            [Line(kind, BYTES, [found[kind]["psnr"][str(size)] for size in BYTES]) for kind in ("network", "gaussian")],
            x="bytes of information per image (ideal coder)",
            y="PSNR, dB",
        )
        for name, found in result["models"].items()
    }
