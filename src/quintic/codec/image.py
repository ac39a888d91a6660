"""The codec: pictures to bytes and back.

    picture -> planes -> tiles -> reverse chain, each step's noise chosen from a codebook -> symbols -> digits -> file

Decoding runs the same chain with the symbols of the file. What the encoder saw at its end is what the decoder makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from quintic.codec.arithmetic import UNIT
from quintic.codec.chain import Choose, Direction, aim, replay, run_chain
from quintic.codec.container import MODES, Header, Parts, join, read_parts
from quintic.codec.curve import Curve
from quintic.codec.guidance import Operator
from quintic.codec.models import Model, as_model, name_for, shipped_model
from quintic.codec.rate import Coded, Sizes, best_within, decibels, file_size, largest_payload, meet_psnr, psnr
from quintic.codec.schedule import Plan, atoms_that_fit, preset_number, preset_plan
from quintic.codec.selection import Ids
from quintic.codec.symbols import from_bytes, from_sequence, payload_size, to_bytes, to_sequence
from quintic.codec.tiles import Layout, check_roi, read_image, to_image, to_values
from quintic.codec.transparency import continue_colours, seen
from quintic.core import CodecError, ConfigError
from quintic.core.counter_rng import Stream
from quintic.core.settings import check_counts
from quintic.diffusion import shipped_names
from quintic.diffusion.denoiser import Denoiser

__all__ = ["Codec", "Tokens"]

_BYTES_PER_VALUE = 16
"""More than any preset can use."""


@dataclass(frozen=True)
class Tokens:
    """A picture as a sequence of whole numbers."""

    ids: Tensor
    """(total,) int64: step by step, at each step tile by tile; 2 atom + sign for presets."""
    header: Header


class Codec:
    """A picture codec around a denoiser.

    Args:
        denoiser: The model; None takes the shipped one that suits each picture or file.
        curve: Its information curve, from :func:`quintic.codec.calibrate`, if it does not know its own.
        preset: standard, fast, fine or finest: 20, 10, 50 or 100 calls of the network.
        batch: Tiles per call in exact mode; without effect on any result.
        max_pixels: Larger pictures and files are refused before anything is allocated.

    Raises:
        ConfigError: Unknown preset, or a denoiser without a curve.

    Example:
        >>> import torch
        >>> from quintic.diffusion import GaussianDenoiser
        >>> smooth = torch.tensor([[2.0 ** -abs(i - j) for i in range(16)] for j in range(16)])
        >>> variances, basis = torch.linalg.eigh(torch.kron(smooth, smooth))
        >>> codec = Codec(GaussianDenoiser(torch.zeros(1, 16, 16), basis, 0.1 * variances.clamp_min(1e-6)))
        >>> picture = Image.linear_gradient("L").resize((20, 11))
        >>> data = codec.encode(picture, target_bytes=60)
        >>> len(data) <= 60, codec.decode(data).size, codec.decode(data).mode
        (True, (20, 11), 'L')
    """

    def __init__(
        self,
        denoiser: Denoiser | None = None,
        *,
        curve: Curve | None = None,
        preset: str = "standard",
        batch: int = 16,
        max_pixels: int = 1 << 24,
    ) -> None:
        preset_number(preset, True)
        check_counts(batch=batch, max_pixels=max_pixels)
        self._own = None if denoiser is None else as_model(denoiser, curve)
        self._shipped: dict[str, Model] = {}
        self.preset = preset
        self.batch = batch
        self.max_pixels = max_pixels

    def __repr__(self) -> str:
        model = "shipped models" if self._own is None else repr(self._own.denoiser)
        return f"Codec({model}, preset={self.preset!r})"

    # -- pictures to files

    def encode(
        self,
        image: Image.Image,
        target_bytes: int | None = None,
        target_psnr: float | None = None,
        quality: int | None = None,
        *,
        exact: bool = False,
        robust: bool = False,
        roi: NDArray[np.float64] | None = None,
        plan: Plan | None = None,
    ) -> bytes:
        """Code a picture; at most one of ``target_bytes``, ``target_psnr``, ``quality`` and ``plan``.

        Args:
            image: Any size; 8 bits per channel. EXIF orientation is applied.
            target_bytes: Largest size of the file, header and all. Where more bytes make the picture no better, above
                about 200 for a tile, fewer are used.
            target_psnr: Quality in dB, met within 0.2 dB, or exceeded where one atom more jumps over it; of transparent
                pictures as :func:`quintic.codec.psnr` says.
            quality: 1 to 100; 50 if nothing is said.
            exact: Pixels that are the same on every processor; slower.
            robust: A longer form in which a flipped bit spoils one atom only.
            roi: (height, width) of weights, positive; where they are larger, more of the bits go. Not in the file.
            plan: Levels, codebooks and atoms of your own, stored in the file.

        Raises:
            ConfigError: Contradictory or impossible wishes; the message names what can be reached.
            DataError: A picture that cannot be coded.
        """
        return self.code(image, target_bytes, target_psnr, quality, exact=exact, robust=robust, roi=roi, plan=plan).data

    def code(
        self,
        image: Image.Image,
        target_bytes: int | None = None,
        target_psnr: float | None = None,
        quality: int | None = None,
        *,
        exact: bool = False,
        robust: bool = False,
        roi: NDArray[np.float64] | None = None,
        plan: Plan | None = None,
    ) -> Coded:
        """:meth:`encode`, and what the decoder will see."""
        upright, mode = read_image(image)
        model, layout = self._model_for(upright, mode)
        values = to_values(upright)
        everywhere = np.ones(values.shape[:2]) if roi is None else check_roi(roi, upright)
        weights = layout.split_map(everywhere, seen(values) if layout.transparent else 1.0)
        tiles = layout.split(continue_colours(values) if layout.transparent else values)

        def direction(x0: NDArray[np.float32], x: NDArray[np.float32], log_snr: float) -> NDArray[np.float32]:
            missing: NDArray[np.float32] = tiles - x0
            return weights * missing

        aims = target_bytes, target_psnr, quality
        return self._targets(upright, model, layout, direction, attrgetter("psnr"), *aims, exact, robust, plan)

    def restore(
        self,
        observed: Operator,
        target_bytes: int | None = None,
        quality: int | None = None,
        *,
        exact: bool = False,
    ) -> Coded:
        """Code a picture of which only a part or a poor copy is known: restored and compressed at once.

        Args:
            observed: What is known and how it came about, from :mod:`quintic.codec.guidance`.
            target_bytes: Largest size of the file.
            quality: 1 to 100, if ``target_bytes`` is not given.
            exact: As for :meth:`encode`.
        """
        height, width, channels = observed.shape
        mode = {1: "L", 3: "RGB"}[channels]
        blank = Image.new(mode, (width, height))
        model, layout = self._model_for(blank, MODES.index(mode))

        def direction(x0: NDArray[np.float32], x: NDArray[np.float32], log_snr: float) -> NDArray[np.float32]:
            return layout.split(observed.residual(layout.merge(x0)), "constant")

        def agreement(made: Coded) -> float:
            return decibels(float(np.square(observed.residual(to_values(made.image))).mean()), 2.0)

        return self._targets(None, model, layout, direction, agreement, target_bytes, None, quality, exact, False, None)

    def _targets(
        self,
        image: Image.Image | None,
        model: Model,
        layout: Layout,
        direction: Direction,
        worth: Callable[[Coded], float],
        target_bytes: int | None,
        target_psnr: float | None,
        quality: int | None,
        exact: bool,
        robust: bool,
        plan: Plan | None,
    ) -> Coded:
        if sum(value is not None for value in (target_bytes, target_psnr, quality, plan)) > 1:
            raise ConfigError("give one of target_bytes, target_psnr, quality and plan, not several")

        if target_bytes is not None:
            check_counts(target_bytes=target_bytes)
        if target_psnr is not None and not math.isfinite(target_psnr):
            raise ConfigError(f"target_psnr must be a number of dB, found {target_psnr}")
        preset = 0 if plan is not None else preset_number(self.preset, model.curve.residuals is not None)

        def header(payload: int) -> Header:
            size, fingerprint = (layout.width, layout.height), model.fingerprint(preset)
            return Header(*size, layout.mode, payload, fingerprint, preset, plan, exact, robust)

        def at(payload: int, attempt: int = 0) -> Coded:
            towards = _astray(direction, attempt) if attempt else direction
            return self._code_one(image, header(payload), model, layout, towards)

        if plan is not None:
            payload = payload_size(plan, layout.count, model.dimension, joint=not robust)
            header(payload).to_bytes()  # what cannot be stored or would not be read is refused before any work
            if not _can_be(payload, plan, model.dimension, layout.count):
                raise ConfigError(
                    f"this plan takes {payload} bytes for {layout.count} tiles of {model.dimension} values; expected "
                    f"up to {_BYTES_PER_VALUE} a value: take fewer atoms or levels"
                )
            return at(payload)
        fits = Sizes(preset, model.dimension, layout.count, not robust)
        if target_psnr is not None:
            return meet_psnr(target_psnr, at, fits)
        if target_bytes is not None:
            payload, allowed = largest_payload(target_bytes, header, fits), target_bytes
        else:
            q = 50 if quality is None else quality
            if q not in range(1, 101):
                raise ConfigError(f"quality must be a whole number between 1 and 100, found {q}")
            payload = fits.payload(fits.of_quality(q))
            allowed = file_size(header(payload))
        made, sated = best_within(payload, at, fits, model.curve, worth)
        sated = sated or payload == fits.payload(fits.most)
        return replace(made, unused=allowed - len(made.data)) if sated else made

    def _code_one(
        self, image: Image.Image | None, header: Header, model: Model, layout: Layout, direction: Direction
    ) -> Coded:
        plan = self._plan(header, model, layout)
        record: list[Ids] = []
        tiles = self._run(model, layout, plan, aim(plan, direction, record), header.exact)
        codes = _padded(record, plan, layout.count)
        data = to_bytes(plan, codes, model.dimension, header.payload, joint=not header.robust)
        result = to_image(layout.merge(tiles), MODES[layout.mode])
        return Coded(join(header, data), result, math.nan if image is None else psnr(image, result))

    # -- files to pictures

    def decode(self, data: bytes, *, strict: bool = True) -> Image.Image:
        """The picture in a file.

        Args:
            data: The file; its beginning is enough if not strict.
            strict: Refuse files that are cut or whose checksum is wrong.

        Raises:
            CodecError: Not such a file, of a newer version, for another model, too large, or damaged.
        """
        parts = read_parts(data, strict=strict)
        model, layout, codes = self._open(parts, strict)
        plan = self._plan(parts.header, model, layout)
        return self._replay(parts.header, model, layout, plan, codes)

    def tokens(self, source: Image.Image | bytes, **targets: object) -> Tokens:
        """A picture (see :meth:`encode` for targets) or a file as whole numbers."""
        data = source if isinstance(source, bytes) else self.encode(source, **targets)  # type: ignore[arg-type]
        parts = read_parts(data)
        _, _, codes = self._open(parts, True)
        return Tokens(torch.from_numpy(to_sequence(codes)), parts.header)

    def from_tokens(self, tokens: Tokens) -> bytes:
        """The file that holds these tokens; the inverse of :meth:`tokens`.

        Raises:
            ConfigError: Tokens that do not fit the header.
        """
        header = tokens.header
        model, layout = self._model_of(header)
        plan = self._plan(header, model, layout)
        codes = from_sequence(tokens.ids.numpy(), plan, layout.count, model.dimension)
        return join(header, to_bytes(plan, codes, model.dimension, header.payload, joint=not header.robust))

    def _replay(self, header: Header, model: Model, layout: Layout, plan: Plan, codes: Sequence[Ids]) -> Image.Image:
        tiles = self._run(model, layout, plan, replay(plan, codes), header.exact)
        return to_image(layout.merge(tiles), MODES[layout.mode])

    def _run(self, model: Model, layout: Layout, plan: Plan, choose: Choose, exact: bool) -> NDArray[np.float32]:
        batch = self.batch if exact else 1
        return run_chain(
            model.denoiser, plan, layout.count, choose, curve=model.curve, exact=exact, batch=batch, kept=model.kept
        )

    def _open(self, parts: Parts, strict: bool) -> tuple[Model, Layout, list[Ids]]:
        header = parts.header
        model, layout = self._model_of(header)
        plan = self._plan(header, model, layout)
        joint, d = not header.robust, model.dimension
        # Before anything as large as the file claims to be is computed.
        if not _can_be(header.payload, plan, d, layout.count):
            raise CodecError(
                f"the file is damaged: {header.payload} bytes of codes for {layout.count} tiles and {sum(plan.atoms)} "
                "atoms in each"
            )
        size, most = plan.size or d, max(plan.atoms, default=0)
        if plan.rule in ("signed", "grouped") and most > size:
            raise CodecError(f"the file is damaged: its plan takes {most} atoms of a codebook of {size}")
        if payload_size(plan, layout.count, d, joint=joint) > header.payload:
            raise CodecError(f"the file is damaged: {header.payload} bytes are too few for its plan")
        codes = from_bytes(parts.data, plan, layout.count, d, header.payload, joint=joint, strict=strict)
        return model, layout, codes

    def _plan(self, header: Header, model: Model, layout: Layout) -> Plan:
        if header.plan is not None:
            return header.plan
        bits = 8 * header.payload // layout.count
        atoms = atoms_that_fit(header.preset, model.dimension, bits, joint=not header.robust)
        if layout.count > 1 and atoms == 0:
            raise CodecError(f"the file is damaged: {header.payload} bytes for a picture of {layout.count} tiles")
        return preset_plan(header.preset, model.curve, model.dimension, atoms)

    # -- models

    def _model_for(self, image: Image.Image, mode: int) -> tuple[Model, Layout]:
        self._check_size(image.width, image.height)
        model = self._own or self._named(name_for(MODES[mode]))
        return model, Layout(image.width, image.height, mode, model.denoiser.shape)

    def _model_of(self, header: Header) -> tuple[Model, Layout]:
        self._check_size(header.width, header.height)
        candidates: list[tuple[str, Callable[[], Model]]]
        if self._own is not None:
            own = self._own
            candidates = [("this codec's model", lambda: own)]
        else:
            candidates = [(name, lambda name=name: self._named(name)) for name in shipped_names()]
        found = []
        for name, load in candidates:
            model = load()
            fingerprint = model.fingerprint(header.preset)
            if fingerprint == header.fingerprint:
                return model, Layout(header.width, header.height, header.mode, model.denoiser.shape)
            found.append(f"{name} is {fingerprint.hex()}")
        raise CodecError(
            f"the file was made with another model: it wants {header.fingerprint.hex()}, {', '.join(found)}; "
            "decode with the model and curve it was encoded with"
        )

    def _named(self, name: str) -> Model:
        if name not in self._shipped:
            self._shipped[name] = shipped_model(name)
        return self._shipped[name]

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise CodecError(
                f"{width} x {height} pixels are more than the {self.max_pixels} allowed; "
                "if they are meant, set Codec(max_pixels=...)"
            )


def _can_be(payload: int, plan: Plan, dimension: int, count: int) -> bool:
    """Whether a file may have so many bytes of codes: every atom takes a bit at least."""
    return payload <= _BYTES_PER_VALUE * dimension * count and sum(plan.atoms) * count <= 8 * payload


def _astray(direction: Direction, attempt: int) -> Direction:
    """A direction that is off at the first level: it costs little, and everything after it comes out otherwise."""
    first = Curve.levels()[0] / UNIT

    def towards(x0: NDArray[np.float32], x: NDArray[np.float32], log_snr: float) -> NDArray[np.floating]:
        straight = direction(x0, x, log_snr)
        if log_snr != first:
            return straight
        aside = Stream(attempt, "another attempt").normal(0, x0.size).reshape(x0.shape)
        return straight + math.sqrt(float(np.square(straight).mean())) * aside

    return towards


def _padded(record: list[Ids], plan: Plan, count: int) -> list[Ids]:
    """The record with the trailing steps that have no code."""
    empty = np.zeros((count, 0), dtype=np.int64)
    return record + [empty] * (len(plan.atoms) - len(record))
