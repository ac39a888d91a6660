"""The picture codec: against WebP at the size of its smallest file, steps, calls of the network, time, and generation.

Rates count whole files where files are compared, and bits of the codes where schedules are. Each part is kept in
``runs/benchmarks/codec``, so that a benchmark that was stopped goes on; delete it to measure again.
"""

from __future__ import annotations

import io
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.claims import Claim, table
from benchmarks.classifier import classifier
from benchmarks.codec_generation import generation, generation_claims, generation_section
from benchmarks.codec_parts import (
    FOLDER,
    STANDARD,
    coded,
    gaussian_model,
    images,
    mean,
    part,
    psnrs,
    single_matched,
    smallest,
    some,
    standard,
)
from benchmarks.fetch_data import fetch
from benchmarks.plot import Line, draw, image
from benchmarks.study import one_thread
from quintic.codec import Codec, paper_plan
from quintic.codec.codebook import OrthogonalCodebook
from quintic.codec.comparison import classic_codecs, classic_file, quality_of
from quintic.codec.models import Model, shipped_model
from quintic.codec.schedule import PRESETS, Plan
from quintic.core import ConfigError
from quintic.core.machine import describe
from quintic.data.images import as_signed
from quintic.diffusion import ancestral_sample, shipped_names

FILES, IMAGES, TARGETED = 200, 40, 40
"""Images coded to real files, coded for schedules, and coded to a wanted quality."""
PHOTOS = "photos"
SIZES = (40, 60, 80, 100, 130, 160)
RATES = (0.4, 0.8)
"""Bits per value."""
ARMS = {
    "paper": "paper's steps, K = 256",
    "paper_matched": "matched, K = 256",
    "uniform_20": "even, 20 calls",
    "steps_20": "matched, 20 calls",
    "steps_10": "10",
    "steps_50": "50 at most",
    "matched_many": "100 at most",
    "matched_20": f"20 calls in {PRESETS[STANDARD].levels} levels",
    "matched_10": "10 in 40",
    "matched_50": "50 in 100 at most",
}
"""Plans of :func:`schedules`, in the order of the table. With more levels than calls, predictions move between calls by
:mod:`quintic.codec.between`."""


def files(name: str) -> dict[str, Any]:
    """Real files at the total size of each image's smallest WebP."""
    data = images(name)
    pixels = some(data, FILES)
    webp = [smallest(p) for p in pixels]
    arms = {"network": Codec(), "gaussian": Codec(gaussian_model(data).denoiser)}
    found: dict[str, Any] = {"images": len(pixels), "webp_bytes": mean([len(f) for f, _ in webp])}
    found["webp"] = [q for _, q in webp]
    decoded = {
        "webp": [np.asarray(Image.open(io.BytesIO(f)).convert("L" if name == "fashion28" else "RGB")) for f, _ in webp]
    }
    for arm, codec in arms.items():
        made = [
            codec.code(Image.fromarray(p.squeeze()), target_bytes=len(f))
            for p, (f, _) in zip(pixels, webp, strict=True)
        ]
        assert all(len(m.data) <= len(f) for m, (f, _) in zip(made, webp, strict=True))
        found[arm] = [m.psnr for m in made]
        found[f"{arm}_bytes"] = mean([len(m.data) for m in made])
        decoded[arm] = [np.asarray(m.image) for m in made]
    if name == "fashion28":
        net = classifier(data, FOLDER / "classifier.pt")
        step = max(1, len(data.test) // FILES)
        labels = data.test.labels[::step][: len(pixels)]
        found["labels"] = {
            arm: float((net.labels(as_signed(np.stack(shown)[..., None])) == labels).mean())
            for arm, shown in {"original": list(pixels[..., 0]), **decoded}.items()
        }
        tiny = [arms["network"].code(Image.fromarray(p.squeeze()), target_bytes=40) for p in pixels]
        found["tiny"] = {"bytes": max(len(m.data) for m in tiny), "psnr": mean([m.psnr for m in tiny])}
    return found


def classics(name: str) -> dict[str, Any]:
    """The smallest files of the other codecs that Pillow writes; nearly all are larger than WebP's."""
    pixels, found = some(images(name), FILES), {}
    for codec in classic_codecs():
        if codec != "webp":
            made = [smallest(p, codec) for p in pixels]
            found[codec] = {"bytes": mean([len(data) for data, _ in made]), "psnr": mean([q for _, q in made])}
    return found


def rates(name: str) -> dict[str, Any]:
    """Quality by the size of a file whose header and checksum take 12 bytes."""
    data, model = images(name), shipped_model(name)
    pixels, other = some(data, IMAGES), gaussian_model(data)
    return {
        kind: {size: mean(psnrs(pixels, coded(m, standard(m, 8 * (size - 12)), pixels))) for size in SIZES}
        for kind, m in (("network", model), ("gaussian", other))
    }


def schedules(name: str) -> dict[str, Any]:
    """The same model, as many calls and bits: the paper's evenly spaced steps against matched ones."""
    data, model = images(name), shipped_model(name)
    pixels, d = some(data, IMAGES), model.dimension

    def quality(arm: str, rate: float, plan: Plan) -> float:
        title = f"schedule-{name}-{model.denoiser.fingerprint[:8]}-{arm}-{rate}"
        return part(title, lambda: mean(psnrs(pixels, coded(model, plan, pixels))))

    found: dict[str, Any] = {}
    for rate in RATES:
        bits = round(rate * d)
        steps = bits // 8
        every = standard(model, bits, 1)
        levels = paper_plan(every.calls, 2).levels
        hundred = standard(model, bits, 4)
        plans = {
            "paper": paper_plan(steps + 1, 256),
            "paper_matched": single_matched(model, steps, 256),
            "uniform_20": Plan(levels, every.atoms, rule=every.rule),
            "steps_20": every,
            "steps_10": standard(model, bits, 2),
            "steps_50": standard(model, bits, 3),
            "matched_many": hundred,
            "matched_20": standard(model, bits),
            "matched_10": standard(model, bits, 6),
            "matched_50": standard(model, bits, 7),
        }
        assert plans.keys() == ARMS.keys()
        found[str(rate)] = {arm: quality(arm, rate, plan) for arm, plan in plans.items()}
        found[str(rate)] |= {"paper_calls": steps + 1, "many": hundred.calls}
    return found


def targets(name: str) -> dict[str, Any]:
    """How near files come to a wanted quality, and whether any size of file near theirs would have come nearer."""
    codec, found = Codec(), {"met": 0, "missed": 0, "none": 0, "below": 0, "beyond": 0}
    for p in some(images(name), TARGETED):
        for target in (26.0, 30.0):
            picture = Image.fromarray(p.squeeze())
            try:
                made = codec.code(picture, target_psnr=target)
            except ConfigError:  # it names what can be reached
                found["beyond"] += 1
                continue
            near = range(max(12, len(made.data) - 10), len(made.data) + 11)
            if abs(made.psnr - target) <= 0.2:
                found["met"] += 1
            elif any(abs(codec.code(picture, target_bytes=size).psnr - target) <= 0.2 for size in near):
                found["missed"] += 1
            else:
                found["none"] += 1
            found["below"] += made.psnr < target - 0.2
    return found


@one_thread()
def timing(name: str) -> dict[str, Any]:
    """One image at a time, one thread, in turn; medians of ratios within a turn, since processors change their pace.

    To be run with nothing else running.
    """
    data, model = images(name), shipped_model(name)
    pixels, found = some(data, 1), {}

    def ratios(actions: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
        """Of each action's time to the last one's."""
        spent = []
        for turn in range(turns + 1):
            times = []
            for action in actions.values():
                started = time.perf_counter()
                action()
                times.append(time.perf_counter() - started)
            if turn:  # the first one makes the codebooks
                spent.append(times)
        times = np.array(spent)
        return dict(zip(actions, np.median(times / times[:, -1:], axis=0).tolist(), strict=True))

    def chains(preset: int) -> tuple[int, dict[str, Callable[[], Any]]]:
        plan = standard(model, round(1.4 * model.dimension), preset)  # bits enough for 100 steps
        levels = [plan.levels[i] / 256 for i in plan.called or range(len(plan.levels))]
        return plan.calls, {
            "encode": lambda: coded(model, plan, pixels),
            "first": lambda: coded(Model(model.denoiser, model.curve), plan, pixels),
            "sample": lambda: ancestral_sample(model.denoiser, 1, levels),
        }

    found["calls_20"], few = chains(STANDARD)
    found["calls_100"], many = chains(4)
    found["of_sample_20"] = ratios(few, 61)
    found["of_sample_100"] = ratios(many, 11)
    found["quicker"] = ratios({"many": many["encode"], "few": few["encode"]}, 11)["many"]
    picture, codec = Image.fromarray(pixels[0].squeeze()), Codec()
    found["exact"] = ratios(
        {
            "exact": lambda: codec.encode(picture, target_bytes=100, exact=True),
            "plain": lambda: codec.encode(picture, target_bytes=100),
        },
        5,
    )["exact"]
    for d in (1 << 14, 1 << 16):
        tracemalloc.start()
        OrthogonalCodebook(d, 0, 0, single=PRESETS[STANDARD].single).inner(np.ones((1, d)))
        found[f"memory_{d}"] = tracemalloc.get_traced_memory()[1] / d
        tracemalloc.stop()
    return found


def photographs() -> list[list[float]]:
    """Photographs of 128 x 128 grey pixels at the sizes of WebP at two qualities: bytes, WebP's PSNR, ours."""
    codec, rows = Codec(), []
    for path in sorted(fetch(PHOTOS).rglob("*.jpg"))[:5]:
        picture = ImageOps.fit(Image.open(path).convert("L"), (128, 128))
        for quality in (10, 40):
            file = classic_file(picture, "webp", quality)
            made = codec.code(picture, target_bytes=len(file))
            rows.append([len(file), quality_of(picture, file), made.psnr])
    return rows


def run() -> dict[str, Any]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": describe(torch.device("cpu"), torch.float32), "seed": 0, "models": {}}
    for name in shipped_names():
        fingerprint = shipped_model(name).denoiser.fingerprint[:8]
        found: dict[str, Any] = {"fingerprint": fingerprint}
        for make in (files, rates, schedules, targets, timing, *([generation] if name == "fashion28" else [])):
            found[make.__name__] = part(
                f"{make.__name__}-{name}-{fingerprint}", lambda make=make, name=name: make(name)
            )
        found["classics"] = part(f"classics-{name}", lambda name=name: classics(name))
        result["models"][name] = found
    result["photographs"] = part("photographs", photographs)
    return result


def section(result: dict[str, Any]) -> str:
    parts = [
        "## The picture codec\n\nTest images only. Sizes are of whole files, header and checksum included. Those of "
        "others are the smallest that Pillow writes."
    ]
    for name, m in result["models"].items():
        f, s, t = m["files"], m["schedules"], m["timing"]
        rows = [("WebP, smallest", f"{f['webp_bytes']:.1f}", f"{mean(f['webp']):.2f} dB", _label(f, "webp"))]
        for codec, c in m.get("classics", {}).items():  # older results have none
            rows.append((f"{codec.upper()}, smallest", f"{c['bytes']:.1f}", f"{c['psnr']:.2f} dB", ""))
        for arm, title in (("network", "quintic"), ("gaussian", "quintic, Gaussian denoiser")):
            rows.append((title, f"{f[arm + '_bytes']:.1f}", f"{mean(f[arm]):.2f} dB", _label(f, arm)))
        parts.append(f"**{name}**, {f['images']} images, quintic's each at the size of its smallest WebP")
        parts.append(table(("codec", "mean bytes", "mean PSNR", "labels kept"), rows))
        if "tiny" in f:
            parts.append(f"At most {f['tiny']['bytes']} bytes: {f['tiny']['psnr']:.2f} dB; no WebP is so small.")
        head = ("bit/value", *ARMS.values())
        parts.append(
            table(head, [(rate, *(f"{v[k]:.2f} dB" if k in v else "" for k in ARMS)) for rate, v in s.items()])
        )
        parts.append(
            f"Encoding takes {t['of_sample_20']['encode']:.3f} times as long as plain sampling with as many "
            f"calls, and {t['of_sample_100']['encode']:.3f} times with {t['calls_100']} calls and no steps between "
            "them. The first prediction is the same for all pictures and is kept, which saves a call; without it, as "
            f"for the first picture of a process, encoding takes {t['of_sample_20']['first']:.3f} times as long; "
            f"20 calls are {t['quicker']:.1f} times quicker than {t['calls_100']}; exact "
            f"mode takes {t['exact']:.1f} times as long. The orthogonal codebook takes "
            f"{t['memory_16384']:.0f} bytes a value at 16384 values, {t['memory_65536']:.0f} at 65536."
        )
        if "targets" in m:  # older results have none
            q = m["targets"]
            parts.append(
                f"Asked for 26 or 30 dB, the file was within 0.2 dB of it {q['met']} times of {_tries(q)} and fell "
                f"short {q['below']} times; {q.get('beyond', 0)} more requests were refused as out of reach. Where it "
                f"was not met, a file up to 10 bytes smaller or larger would have met it {q['missed']} times: among "
                "small files quality jumps from one size to the next."
            )
        if "generation" in m:
            parts.append(generation_section(m["generation"]))
        parts.append(image(f"codec_{name}", f"Quality by size of file, {name}"))
    size, webp, own = (mean(column) for column in zip(*result["photographs"], strict=True))
    parts.append(
        f"On larger pictures it loses: on grey photographs of 128 x 128 pixels, coded in tiles by the model of "
        f"thumbnails, WebP has {webp:.1f} dB at {size:.0f} bytes and this codec {own:.1f} dB."
    )
    return "\n\n".join(parts)


def _tries(targets: dict[str, int]) -> int:
    return targets["met"] + targets["missed"] + targets["none"]


def _label(found: dict[str, Any], arm: str) -> str:
    if "labels" not in found:
        return ""
    return f"{found['labels'][arm]:.1%} (originals {found['labels']['original']:.1%})"


def claims(result: dict[str, Any]) -> list[Claim]:
    made = []
    for name, m in result["models"].items():
        f, s, t = m["files"], m["schedules"], m["timing"]
        gain = mean(f["network"]) - mean(f["webp"])
        over = mean(f["network"]) - mean(f["gaussian"])
        bar = 4.0 if name == "fashion28" else 0.0
        rows = [
            (f"{name}: {bar:g} dB or more over WebP at the size of its smallest file", f"{gain:+.1f} dB", gain >= bar),
            (f"{name}: trained 1.5 dB or more over Gaussian at equal bytes", f"{over:+.1f} dB", over >= 1.5),
        ]
        for codec, c in m.get("classics", {}).items():  # older results have none
            better = mean(f["network"]) - c["psnr"]
            title = f"{name}: better than the smallest {codec.upper()}, in fewer bytes"
            measured = f"{f['network_bytes']:.0f} against {c['bytes']:.0f} bytes, {better:+.1f} dB"
            rows.append((title, measured, better > 0 and f["network_bytes"] < c["bytes"]))
        for rate, bar in (("0.4", 2.0), ("0.8", 3.0)):
            better = s[rate]["paper_matched"] - s[rate]["paper"]
            title = f"{name}: matched steps {bar:g} dB or more over the paper's at {rate} bit per value, equal calls"
            rows.append((title, f"{better:+.1f} dB", better >= bar))
            lost = s[rate]["paper_matched"] - s[rate]["matched_20"]
            title = f"{name}: 20 calls within 0.6 dB of one atom of 256 at each of {s[rate]['paper_calls']}, {rate} bit"
            rows.append((title, f"{lost:.2f} dB", lost <= 0.6))
            lost = s[rate]["matched_many"] - s[rate]["matched_20"]
            title = f"{name}: 20 calls within 0.6 dB of one at every level, {s[rate]['many']}, {rate} bit"
            rows.append((title, f"{lost:.2f} dB", lost <= 0.6))
        faster = t["quicker"]
        rows.append((f"{name}: 20 calls 4 times quicker than {t['calls_100']}", f"{faster:.1f} times", faster >= 4))
        if "targets" in m:
            q = m["targets"]
            met = q["met"] / _tries(q)
            title = f"{name}: a wanted quality of 26 or 30 dB met within 0.2 dB for 95 % of pictures"
            rows.append((title, f"{met:.1%}", met >= 0.95))
        for calls, steps in (("20", f"up to {PRESETS[STANDARD].levels}"), ("100", "as many")):
            ratio = t[f"of_sample_{calls}"]["encode"]
            title = f"{name}: encoding takes at most 1.05 times plain sampling, {calls} calls and {steps} levels"
            rows.append((title, f"{ratio:.3f}", ratio <= 1.05))
        ratio = t["of_sample_20"]["first"]
        title = f"{name}: and so does the first picture of a process, for which all 20 calls are made"
        rows.append((title, f"{ratio:.3f}", ratio <= 1.05))
        made += [Claim(claim, "ours", measured, 0, "yes" if ok else "no", "codec") for claim, measured, ok in rows]
        made += generation_claims(name, m["generation"]) if "generation" in m else []
    return made


def plots(result: dict[str, Any]) -> dict[str, str]:
    shown = {}
    for name, m in result["models"].items():
        lines = [Line(kind, SIZES, [m["rates"][kind][str(size)] for size in SIZES]) for kind in ("network", "gaussian")]
        lines.append(Line("WebP, smallest", [m["files"]["webp_bytes"]], [mean(m["files"]["webp"])]))
        for codec, c in m.get("classics", {}).items():
            lines.append(Line(f"{codec.upper()}, smallest", [c["bytes"]], [c["psnr"]]))
        shown[f"codec_{name}"] = draw(f"{name}: quality by size of file", lines, x="bytes", y="PSNR, dB")
    return shown
