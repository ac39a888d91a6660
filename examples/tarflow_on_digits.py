"""A normalizing flow of digits: exact likelihood, exact samples, a classifier for free.

Digits are drawn with Pillow's own typeface, moved and turned a little at random. A small TARFLOW learns
p(picture | digit) in a plain loop, by maximum likelihood and nothing else. One sees the log-likelihood of digits it has
not trained on rise, the share of them that Bayes' rule names rightly (the label under which the picture is the most
likely), how far a picture is missed when its latents are decoded, and samples as a PNG, a column for every digit.

    python examples/tarflow_on_digits.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from quintic import Muon, TarFlow
from quintic.data.images import as_pixels, image_grid
from quintic.flow import Guidance

SIDE, BATCH = 12, 64


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, SIDE, SIDE) from -1 to 1, and what they show."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(48)
    pictures = np.empty((count, 1, SIDE, SIDE), dtype=np.float32)
    for i in range(count):
        page = Image.new("L", (48, 48))
        ImageDraw.Draw(page).text((24, 24), str(i % 10), fill=255, font=font, anchor="mm")
        page = page.rotate(
            rng.uniform(-9, 9), translate=tuple(rng.uniform(-3, 3, 2)), resample=Image.Resampling.BILINEAR
        )
        pictures[i, 0] = np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX)) / np.float32(127.5) - 1
    return torch.from_numpy(pictures), torch.arange(count) % 10


def likelihood(flow: TarFlow, pictures: Tensor, shown: Tensor) -> tuple[float, float]:
    """Mean log-likelihood of noisy pictures in nats a pixel, and the share that Bayes' rule names rightly."""
    noisy = pictures + flow.sigma * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = torch.stack([flow.log_prob(noisy, label) for label in range(10)], 1)
    own = scores.gather(1, shown[:, None]).mean().item() / pictures[0].numel()
    return own, (scores.argmax(1) == shown).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    """Train, measure, sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(argv)
    pictures, shown = digits(4000, seed=0)
    held, held_shown = digits(200, seed=1)
    flow = TarFlow((1, SIDE, SIDE), patch=3, width=64, blocks=4, layers=1, num_classes=10, sigma=0.1, seed=0)
    optimizer = Muon(flow, lr=4e-3, weight_decay=0.01)
    torch.manual_seed(0)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1.0 - step / options.steps)
        chosen = torch.randint(len(pictures), (BATCH,))
        noisy = pictures[chosen] + flow.sigma * torch.randn(BATCH, 1, SIDE, SIDE)
        told = torch.where(torch.rand(BATCH) < 0.1, -1, shown[chosen])  # at times not told which digit, for guidance
        loss = -flow.log_prob(noisy, told).mean() / pictures[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 5) == 0 or step == options.steps - 1:
            own, right = likelihood(flow, held, held_shown)
            print(f"step {step + 1:4}: log-likelihood {own:6.3f} nats a pixel, {right:.0%} named rightly")
    # Noise of standard deviation sigma has an entropy: no model's mean log-likelihood of noisy pictures is beyond it.
    print(f"bound set by the noise: {-0.5 * math.log(2 * math.pi * math.e * flow.sigma**2):.3f}")
    with torch.no_grad():
        latents, _ = flow(held, held_shown)
        again, _ = flow.decode(latents, held_shown, method="sequential")
    print(f"latents and back: off by at most {(again - held).abs().max():.0e}")
    samples = flow.sample(100, torch.arange(100) % 10, method="sequential", guidance=Guidance(1.0)).images
    image_grid(as_pixels(samples.numpy())).save(options.out / "digits.png")
    print(f"samples: {options.out / 'digits.png'}")


if __name__ == "__main__":
    main()
