"""TARFLOW: an exact normalizing flow made of causal transformers over image patches.

    z = f_T(... f_1(x)),    log p(x) = log N(z; 0, V) + sum_t log |det df_t|

Every f_t is an affine autoregression (:mod:`quintic.flow.block`), its order of patches reversed from block to block, so
that the whole is not causal and, with two blocks or more, no longer a plain Gaussian in any direction. A fresh model is
the identity. Post 10667; Zhai et al. 2024, arXiv 2412.06329.

Images are (b, c, h, w) with pixels from -1 to 1; latents have the same shape. Log-densities are of those pixels, in
nats, whatever preprocessing stands before the flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from quintic.core import ConfigError, DataError, SamplingError
from quintic.core.counter_rng import Stream
from quintic.core.initial import initialize_
from quintic.core.roles import Constant, Role, declare
from quintic.core.settings import check_counts
from quintic.flow.block import FlowBlock
from quintic.flow.config import check_arguments
from quintic.flow.guess import LinearGuess
from quintic.flow.guidance import Guidance
from quintic.flow.invert import Inversion, invert_flow
from quintic.flow.labels import class_rows
from quintic.flow.likelihood import bits, dequantise, log_normal, logit_forward, logit_inverse
from quintic.flow.patches import check_patch, to_image, to_tokens
from quintic.flow.planning import SamplingPlan
from quintic.flow.precision import full_precision
from quintic.flow.samples import Samples, great_circle
from quintic.flow.spline import Spline

__all__ = ["TarFlow"]

_TRIES = 4


class TarFlow(nn.Module):
    """An exact normalizing flow of images.

    Args:
        shape: (channels, height, width) of the images.
        patch: Height and width of a token; divides both.
        width: Channels of the transformers.
        blocks: Flow blocks.
        layers: Attention layers of a block.
        head_width: Channels of a head; divides ``width``.
        num_classes: Classes to condition on; 0 is without.
        noise: What images are trained with: ``gaussian`` (to look at samples) or ``uniform`` (for the likelihood).
        sigma: Of gaussian noise.
        levels: Of a pixel, for :meth:`bits_per_dim`.
        preprocess: ``scale`` or ``logit`` (:mod:`quintic.flow.likelihood`); ``logit`` wants uniform noise.
        spline_bins: Of a learned monotone map of every number before the blocks, and of another one behind them
            (:mod:`quintic.flow.spline`); 0 is without.
        inner_width: Of a layer by which numbers of a token are predicted from those before (:mod:`quintic.flow.inner`);
            0 is without.
        volume_preserving: Blocks only shift.
        learned_prior: The variance of every latent is learned.
        direction: ``density`` (log_prob is parallel, sampling sequential) or ``sampling`` (the reverse).
        checkpoint: Training keeps the inputs of blocks alone.
        seed: Initial weights are a pure function of (seed, parameter name, position). None draws a seed from torch's
            default generator, so that ``torch.manual_seed`` governs them as it does those of ``torch.nn``.
        initialize: False leaves the weights to :func:`quintic.core.initial.initialize_` or a checkpoint.

    Raises:
        ConfigError: Sizes that do not fit.

    Example:
        >>> flow = TarFlow((1, 4, 6), patch=2, width=8, blocks=2, layers=1, head_width=8, seed=0)
        >>> flow.log_prob(torch.zeros(3, 1, 4, 6)).shape
        torch.Size([3])
        >>> flow.sample(5).images.shape
        torch.Size([5, 1, 4, 6])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        patch: int = 4,
        width: int = 64,
        blocks: int = 4,
        layers: int = 2,
        head_width: int = 32,
        num_classes: int = 0,
        noise: str = "gaussian",
        sigma: float = 0.1,
        levels: int = 256,
        preprocess: str = "scale",
        spline_bins: int = 0,
        inner_width: int = 0,
        volume_preserving: bool = False,
        learned_prior: bool = False,
        direction: str = "density",
        checkpoint: bool = False,
        seed: int | None = None,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "shape": shape, "patch": patch, "width": width, "blocks": blocks, "layers": layers,
            "head_width": head_width, "num_classes": num_classes, "noise": noise, "sigma": sigma, "levels": levels,
            "preprocess": preprocess, "spline_bins": spline_bins, "inner_width": inner_width,
            "volume_preserving": volume_preserving, "learned_prior": learned_prior, "direction": direction,
        }  # fmt: skip
        check_arguments(self.arguments)
        self.shape = shape
        self.patch = patch
        self.num_classes = num_classes
        self.noise, self.sigma, self.levels = noise, sigma, levels
        self.preprocess, self.direction, self.checkpoint = preprocess, direction, checkpoint
        self.tokens, self.numbers = check_patch(self.shape, patch)
        if inner_width and self.numbers < 2:
            raise ConfigError("inner_width is for tokens of two numbers or more; choose a larger patch")
        self.blocks = nn.ModuleList(
            FlowBlock(
                self.tokens, self.numbers, width, layers, head_width, num_classes=num_classes,
                flipped=index % 2 == 1, volume_preserving=volume_preserving, inner_width=inner_width,
            )
            for index in range(blocks)
        )  # fmt: skip
        # Logits end at 2.8, pixels with their noise a little beyond 1; latents are about normal.
        self.before = Spline(spline_bins, 3.0 if preprocess == "logit" else 1.5) if spline_bins else None
        self.behind = Spline(spline_bins, 4.0) if spline_bins else None
        if learned_prior:
            self.prior_log_variance = nn.Parameter(torch.empty(self.tokens, self.numbers))
            declare(self, "prior_log_variance", Role.VECTOR, Constant(0.0))
        else:
            self.register_parameter("prior_log_variance", None)
        if initialize:
            initialize_(self, seed)

    @property
    def stack(self) -> list[FlowBlock]:
        """The blocks, data first."""
        return list(self.blocks)  # pyright: ignore[reportReturnType]

    @property
    def dims(self) -> int:
        """Numbers of an image."""
        return math.prod(self.shape)

    def forward(self, images: Tensor, labels: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Images to latents.

        Args:
            images: (b, c, h, w), pixels from -1 to 1.
            labels: Class or (b,) classes; None and -1 are "no label".

        Returns:
            Latents (b, c, h, w) and log |dz/dx| (b,).

        Raises:
            DataError: Another shape, or labels out of range.
        """
        tokens, logdet = self._encode(images, self.rows(labels, len(images)))
        return to_image(tokens, self.shape, self.patch), logdet

    def log_prob(self, images: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """Log-density of images, (b,) in nats; arguments as of :meth:`forward`."""
        tokens, logdet = self._encode(images, self.rows(labels, len(images)))
        return log_normal(tokens, self.prior_log_variance) + logdet

    def bits_per_dim(
        self, images: Tensor, labels: Tensor | int | None = None, *, samples: int = 1, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Upper bound of -log2 P(levels) per number of an image, by uniform dequantisation.

        Args:
            images: (b, c, h, w) integers from 0 to ``levels - 1``.
            labels: As of :meth:`forward`.
            samples: Draws of the noise; more give a tighter bound.
            seed: Of the noise, a pure function of seed and image number.
            first: Number of the first image.

        Returns:
            (b,).

        Raises:
            ConfigError: ``samples`` is less than 1, ``first`` than 0, or the weights are in half precision.
            DataError: Pixels are no such integers.
        """
        check_counts(samples=samples)
        check_counts(0, first=first)
        weight = self.stack[0].position  # tells device and precision
        parts = []
        for draw in range(samples):
            uniform = Stream(seed, "dequantisation", draw).uniform(first * self.dims, images.numel())
            noise = torch.from_numpy(uniform).to(weight).view(images.shape)
            with full_precision(weight):
                parts.append(self.log_prob(dequantise(images.to(weight.device), noise, self.levels), labels))
        return bits(torch.stack(parts), self.dims, self.levels)

    def denoise(self, images: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """The expected clean image, x + sigma^2 * grad log p(x) (Tweedie), of images with the noise of training.

        Raises:
            ConfigError: The model was not trained with gaussian noise, or its weights are in half precision.
        """
        if self.noise != "gaussian":
            raise ConfigError("this flow was trained with uniform noise and has no denoiser; sample with denoise=False")
        images = images.detach()
        with torch.enable_grad(), full_precision(self.stack[0].position):
            variable = images.clone().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(variable, labels).sum(), variable)
        return images + self.sigma**2 * score

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        labels: Tensor | int | None = None,
        *,
        method: str | SamplingPlan = "auto",
        guidance: Guidance | None = None,
        certify: bool = False,
        guess: LinearGuess | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Inversion]:
        """Latents to images, the inverse of :meth:`forward`.

        Args:
            latents: (b, c, h, w); left as they are.
            labels: As of :meth:`forward`.
            method: ``auto`` (measure and plan), ``sequential``, ``jacobi``, ``window:K``, or a plan.
            guidance: Towards the class; the map is then another one, still exactly inverted.
            certify: Check sequential blocks by a parallel pass too, not only those that guessed.
            guess: Where guessing begins; it changes how many sweeps are needed, not what is found.
            check: Called before every block; what it raises ends the work.

        Returns:
            Images (b, c, h, w) and the certificate; a warning says so if a block that was checked failed to the end.

        Raises:
            DataError: Another shape, or labels out of range.
            ConfigError: Unknown method, guidance that this model cannot follow, or weights in half precision.
        """
        self._check(latents)
        rows = self.rows(labels, len(latents))
        if guidance is not None and guidance.weight and guidance.temperature == 1.0 and labels is None:
            raise ConfigError("guidance needs a class to go to, or a temperature other than 1")
        if self.direction == "sampling" and guidance is not None and guidance.weight:
            raise ConfigError("guidance is for direction = 'density'")
        with full_precision(self.stack[0].position):
            tokens = to_tokens(latents, self.patch)
            if self.behind is not None:
                tokens = self.behind.inverse(tokens)
            if self.direction == "sampling":
                for block in self.stack:
                    check()
                    tokens = block(tokens, rows)[0]
                found = Inversion(tokens, ())
            else:
                found = invert_flow(
                    self, tokens, rows, method=method, guidance=guidance, certify=certify, guess=guess, check=check
                )
            tokens = found.tokens if self.before is None else self.before.inverse(found.tokens)
        images = to_image(tokens, self.shape, self.patch)
        return (logit_inverse(images) if self.preprocess == "logit" else images), found

    def sample(
        self,
        n: int,
        labels: Tensor | int | None = None,
        *,
        seed: int = 0,
        method: str | SamplingPlan = "auto",
        guidance: Guidance | None = None,
        denoise: bool | None = None,
        certify: bool = False,
        guess: LinearGuess | None = None,
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Samples:
        """Draw images.

        Args:
            n: How many.
            labels: Class, or (n,) classes; None and -1 are "no label".
            seed: Latent number i is a pure function of it, and image number i is too, to rounding: methods, batch sizes
                and threads add in different orders, and ``auto`` chooses a method by timing. The same digits come from
                ``sequential``, say, with the same batch and threads on the same machine.
            method: See :meth:`decode`.
            guidance: See :meth:`decode`.
            denoise: Whether to remove the noise of training; None does so if it was gaussian.
            certify: See :meth:`decode`.
            guess: See :meth:`decode`.
            batch: Images at a time.
            progress: Told images done and wanted.
            check: See :meth:`decode`.

        Raises:
            DataError: Labels out of range, or of another number.
            ConfigError: Fewer than one image or batch, or see :meth:`decode`.
            SamplingError: An image was not finite in four draws.
        """
        check_counts(n=n, batch=batch)
        self.rows(labels, n)  # refused before anything is drawn
        if denoise is None:
            denoise = self.noise == "gaussian"
        rows = labels if labels is None or isinstance(labels, int) else torch.as_tensor(labels).expand(n)
        images, latents, inversions, redrawn = [], [], [], 0
        for first in range(0, n, batch):
            count = min(batch, n - first)
            part = rows[first : first + count] if isinstance(rows, Tensor) else rows
            z = self._draw(count, seed, 0, first)
            x, found = self.decode(z, part, method=method, guidance=guidance, certify=certify, guess=guess, check=check)
            inversions.append(found)
            for attempt in range(1, _TRIES):
                bad = ~x.isfinite().flatten(1).all(1)
                if not bad.any():
                    break
                redrawn += int(bad.sum())
                again = self._draw(count, seed, attempt, first)[bad]
                part_again = part[bad.to(part.device)] if isinstance(part, Tensor) else part
                z[bad] = again
                x[bad] = self.decode(again, part_again, method="sequential", guidance=guidance)[0]
            if not x.isfinite().all():
                raise SamplingError(f"images were not finite in {_TRIES} draws; the weights of this flow are unusable")
            images.append(self.denoise(x, part) if denoise else x)
            latents.append(z)
            if progress:
                progress(first + count, n)
        return Samples(torch.cat(images), torch.cat(latents), tuple(inversions), redrawn)

    def interpolate(
        self, one: Tensor, other: Tensor, steps: int, labels: Tensor | int | None = None, **options: Any
    ) -> Tensor:
        """Images on the great circle between the latents of two.

        Args:
            one: (c, h, w).
            other: (c, h, w).
            steps: Images, both ends included, at least 2.
            labels: One class for all.
            **options: Of :meth:`decode`.

        Returns:
            (steps, c, h, w).

        Raises:
            ConfigError: Fewer than two images, or see :meth:`decode`.
            DataError: Another shape, or a class out of range.
        """
        check_counts(2, steps=steps)
        with torch.no_grad(), full_precision(self.stack[0].position):
            a, b = self(torch.stack([one, other]), labels)[0]
        return self.decode(great_circle(a, b, steps), labels, **options)[0]

    def rows(self, labels: Tensor | int | None, batch: int) -> Tensor | None:
        """Rows (b,) of the class tables (:func:`quintic.flow.labels.class_rows`)."""
        return class_rows(labels, batch, self.num_classes, self.stack[0].position.device)

    def as_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block sees of images, (b, n, d), and log |det| (b,) of the way there."""
        self._check(images)
        if self.preprocess == "logit":
            images, total = logit_forward(images)
        else:
            total = images.new_zeros(len(images))
        tokens = to_tokens(images, self.patch)
        if self.before is not None:
            tokens, logdet = self.before(tokens)
            total = total + logdet
        return tokens, total

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise DataError(f"this flow is for images (batch, {self.shape}), found {tuple(images.shape)}")

    def _encode(self, images: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent tokens (b, n, d) and log |dz/dx| (b,)."""
        x, total = self.as_tokens(images)
        for block in self.stack if self.direction == "density" else reversed(self.stack):
            one_way = block if self.direction == "density" else block.inverse
            if self.checkpoint and torch.is_grad_enabled():
                x, logdet = checkpointed(one_way, x, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                x, logdet = one_way(x, rows)
            total = total + logdet
        if self.behind is not None:
            x, logdet = self.behind(x)
            total = total + logdet
        return x, total

    def _draw(self, n: int, seed: int, attempt: int, first: int) -> Tensor:
        normal = Stream(seed, "latents", attempt).normal(first * self.dims, n * self.dims)
        z = torch.from_numpy(normal).to(self.stack[0].position).view(n, self.tokens, self.numbers)
        if self.prior_log_variance is not None:
            z = z * torch.exp(0.5 * self.prior_log_variance.detach())
        return to_image(z, self.shape, self.patch)
