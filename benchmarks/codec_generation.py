"""Images from random codes: what the paper and the post say of codebooks, by Frechet distances.

Chains are DDPM's as in the paper: evenly spaced times of the linear schedule, the variance of the posterior, codebooks
of normal vectors. The paper has 1,000 steps; K = 2 then has 1,000 bits an image, and at 60 steps only 60.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims import Claim, table
from benchmarks.classifier import classifier, frechet
from benchmarks.codec_parts import FOLDER, images, part, some
from quintic.codec import paper_plan
from quintic.codec.guidance import generate
from quintic.codec.models import shipped_model
from quintic.data.images import as_signed
from quintic.diffusion import ancestral_sample

CHUNK = 50
BOOKS: dict[str, tuple[int, bool]] = {
    "separate 2": (2, False),
    "separate 16": (16, False),
    "separate 64": (64, False),
    "shared 64": (64, True),
    "shared 1024": (1024, True),
    "shared 8192": (8192, True),
}
FREE = "normal noise"
MANY, FEW = 400, 100
"""Images of each codebook at 60 steps, and of those whose dependence on the number of steps is shown."""
BY_STEPS = ("separate 2", "separate 64", "shared 64", FREE)
STEPS = (60, 250)


def generation(name: str) -> dict[str, Any]:
    """Frechet distances to 2,000 test images in features of the classifier, of few images by steps, of more at 60."""
    data, model = images(name), shipped_model(name)
    net, tag = classifier(data, FOLDER / "classifier.pt"), f"generated-{model.denoiser.fingerprint[:8]}"
    true = net.features(as_signed(some(data, 2000)))

    def made(book: str, steps: int, chunk: int) -> NDArray[np.float32]:
        if book == FREE:
            levels = [level / 256 for level in paper_plan(steps, 2).levels]
            return ancestral_sample(model.denoiser, CHUNK, levels, seed=chunk).numpy()
        size, shared = BOOKS[book]
        return generate(model.denoiser, paper_plan(steps, size, shared=shared), CHUNK, chunk, batch=CHUNK)[1]

    def distance(book: str, steps: int, count: int) -> float:
        rows: list[Any] = []
        for chunk in range(count // CHUNK):
            make: Callable[[], Any] = lambda chunk=chunk: net.features(made(book, steps, chunk)).tolist()  # noqa: E731
            rows += part(f"{tag}-{book.replace(' ', '-')}-{steps}-{chunk}", make)
        return frechet(np.array(rows), true)

    found: dict[str, Any] = {book: distance(book, 60, MANY) for book in (*BOOKS, FREE)}
    found["other test images"] = _others(data, net, true, MANY)
    found["by steps"] = {str(steps): {book: distance(book, steps, FEW) for book in BY_STEPS} for steps in STEPS}
    found["few other test images"] = _others(data, net, true, FEW)
    return found


def _others(data: Any, net: Any, true: NDArray[np.float64], count: int) -> float:
    return frechet(net.features(as_signed(data.test.images[1 :: len(data.test) // count][:count])), true)


def generation_section(found: dict[str, Any]) -> str:
    rows = [(book, f"{found[book]:.1f}") for book in (*BOOKS, FREE, "other test images")]
    parts = [
        f"Frechet distance of {MANY} generated images by codebook, 60 steps",
        table(("codebook", "distance"), rows),
    ]
    if "by steps" in found:
        longer = [(book, *(f"{by[book]:.1f}" for by in found["by steps"].values())) for book in BY_STEPS]
        parts += [
            f"The same of {FEW} images by the number of steps (so few have larger distances: as many test images have "
            f"{found['few other test images']:.1f})",
            table(("codebook", *(f"{steps} steps" for steps in found["by steps"])), longer),
        ]
    return "\n\n".join(parts)


def generation_claims(name: str, found: dict[str, Any]) -> list[Claim]:
    """What the paper and the post say of random picks, at 60 steps and at more."""
    made = []
    sets = [(60, MANY, found), *((int(steps), FEW, by) for steps, by in found.get("by steps", {}).items())]
    for steps, count, distance in sets:
        if count == FEW and steps == 60:
            continue
        near = {book: distance[book] / distance[FREE] for book in BOOKS if book in distance}
        rows = [
            ("64 atoms at each step make images as good as DDPM's", "separate 64", near["separate 64"] <= 1.1),
            ("two atoms at each step come close to that", "separate 2", near["separate 2"] <= 2.0),
            ("one codebook for all steps must be far larger", "shared 64", near["shared 64"] > 2 * near["separate 64"]),
        ]
        if "shared 8192" in near:
            rows.append(("with thousands of atoms one codebook is enough", "shared 8192", near["shared 8192"] <= 1.2))
        made += [
            Claim(
                f"{name}, {count} images of {steps} steps: {text}", "post 10711, arXiv 2502.01189",
                f"Frechet distance {distance[book]:.1f}, normal noise {distance[FREE]:.1f}: {near[book]:.1f} times", 1,
                "yes" if ok else "no", "codec",
            )
            for text, book, ok in rows
        ]  # fmt: skip
    return made
