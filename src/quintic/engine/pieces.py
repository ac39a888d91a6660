"""Tensors in safetensors files, whole or in pieces: every rank writes what it holds and reads what it needs.

One process writes ``NAME.safetensors`` with whole tensors. Among four shards each writes a file,
``NAME-00001-of-00004.safetensors`` and so on: pieces of the divided tensors, whose places stand in the header under
``pieces`` ({tensor: [whole shape, first index on every axis]} in JSON), and in the first file also the tensors that
every rank has whole. Any number of ranks can read them again. No tensor is ever put together for writing, and none is
pickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from quintic.core import CheckpointError
from quintic.core.divided import region
from quintic.core.tensors import save_tensors

__all__ = ["Held", "Stored", "held_here", "part_files", "save_held"]


class Held(NamedTuple):
    """What one rank writes of some tensors."""

    tensors: dict[str, Tensor]
    places: dict[str, tuple[list[int], list[int]]]
    """Of the pieces among them: {name: (shape of the whole, first index on every axis)}."""
    shard: int
    """Number of this rank among the shards; -1 if another rank writes the same."""
    shards: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def held_here(tensors: Mapping[str, Tensor], *, shard: int = 0, shards: int = 1, copy: bool = False) -> Held:
    """Choose what this rank has to write, without communication.

    Args:
        tensors: Whole, and equal on all ranks, or divided.
        shard: Number of this rank among the shards of the first replica; -1 in another one.
        shards: How many there are.
        copy: Detach from the tensors, so that they may change before these are written.
    """
    chosen: dict[str, Tensor] = {}
    places: dict[str, tuple[list[int], list[int]]] = {}
    for name, tensor in tensors.items() if shard >= 0 else ():
        here = tensor
        if isinstance(tensor, DTensor) and shards > 1:
            here, start = tensor.to_local(), region(tensor)[0]
            if not here.numel():
                continue
            places[name] = (list(tensor.shape), start)
        elif shard > 0:
            continue
        elif isinstance(tensor, DTensor):
            here = tensor.to_local()
        chosen[name] = here.detach().to("cpu", copy=copy).contiguous()
    return Held(chosen, places, shard, shards)


def save_held(folder: Path, part: str, held: Held) -> Path | None:
    """Write a rank's file of ``part`` into a folder; None if it has nothing to write."""
    if held.shard < 0:
        return None
    name = part if held.shards == 1 else f"{part}-{held.shard + 1:05d}-of-{held.shards:05d}"
    path = folder / f"{name}.safetensors"
    save_tensors(held.tensors, path, {"pieces": json.dumps(held.places)} if held.places else None)
    return path


def part_files(folder: Path, part: str, names: Iterable[str] | None = None) -> list[Path]:
    """The files that hold a part of a checkpoint together; empty if it has none.

    Args:
        folder: Holds them.
        part: Name of the part.
        names: Of the files to choose from; None takes all that are in the folder.

    Raises:
        CheckpointError: Some are missing among these names, or there are others of the same part.
    """
    pattern = re.compile(rf"{re.escape(part)}(?:-(\d{{5,}})-of-(\d{{5,}}))?\.safetensors")
    among = sorted(path.name for path in folder.iterdir()) if names is None else sorted(names)
    found = {name: match.groups() for name in among if (match := pattern.fullmatch(name))}
    shards = max((int(of or 1) for _, of in found.values()), default=0)
    if shards != len(found) or any(
        int(of or 1) != shards or int(number or 1) > shards for number, of in found.values()
    ):
        raise CheckpointError(f"{folder}: {', '.join(found)} are not all the files of one {part}")
    return [folder / name for name in found]


class _Piece(NamedTuple):
    file: int
    start: list[int]
    shape: list[int]


class Stored:
    """The tensors that some files hold, to be read whole or as far as a rank needs them.

    Args:
        files: Each place of a tensor is in one of them.

    Raises:
        CheckpointError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_held(Path(folder), "model", held_here({"weight": torch.arange(6.0).view(2, 3)}))
        ...     stored = Stored(part_files(Path(folder), "model"))
        ...     stored.shapes, stored.read("weight").sum().item()
        ({'weight': (2, 3)}, 15.0)
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._open: list[Any] = []
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors."""
        for number, path in enumerate(self._files):
            try:
                file = safe_open(path, framework="pt")
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                places = _places((file.metadata() or {}).get("pieces", "{}"), shapes)
            except (OSError, SafetensorError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
            self._open.append(file)
            for name, shape in shapes.items():
                whole, start = places.get(name, (shape, [0] * len(shape)))
                if self.shapes.setdefault(name, tuple(whole)) != tuple(whole):
                    raise CheckpointError(f"{path} is damaged: {name} has another shape in another file")
                self._pieces.setdefault(name, []).append(_Piece(number, start, shape))

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """Read a tensor.

        Args:
            name: Of the tensor.
            like: A divided tensor of the same shape: read the same piece, and divide in the same way. Else all is read.

        Raises:
            CheckpointError: Parts of it are in none of the files.
        """
        shape = self.shapes[name]
        divided = like if isinstance(like, DTensor) and like.shape == shape else None
        first, sizes = ([0] * len(shape), list(shape)) if divided is None else region(divided)
        here = self._read_region(name, first, sizes)
        if divided is None:
            return here
        return DTensor.from_local(
            here.to(divided.device), divided.device_mesh, divided.placements, run_check=False,
            shape=divided.shape, stride=divided.stride(),
        )  # fmt: skip

    def _read_region(self, name: str, first: list[int], sizes: list[int]) -> Tensor:
        pieces = self._pieces[name]
        for piece in pieces:
            if piece.start == first and piece.shape == sizes:
                return self._open[piece.file].get_tensor(name)
        parts: list[tuple[_Piece, list[int], list[int]]] = []
        for piece in pieces:
            low = [max(a, b) for a, b in zip(first, piece.start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(first, sizes, piece.start, piece.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                parts.append((piece, low, high))
        found = sum(math.prod(b - a for a, b in zip(low, high, strict=True)) for _, low, high in parts)
        if found < math.prod(sizes):  # before there is room made for it: a damaged header may name any size
            files = ", ".join(path.name for path in self._files)
            raise CheckpointError(f"{name} is not complete in {files}; a file of the checkpoint is missing")
        nothing = (slice(0, 0),) * len(sizes)
        region = torch.empty(sizes, dtype=self._open[pieces[0].file].get_slice(name)[nothing].dtype)
        for piece, low, high in parts:
            values = self._open[piece.file].get_slice(name)[_between(low, high, piece.start)]
            region[_between(low, high, first)] = values
        return region


def _places(text: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[list[int], list[int]]]:
    """Where the pieces of a file are, read from its header.

    Raises:
        ValueError: It says something else, or what does not fit the tensors of the file.
    """
    places = json.loads(text)
    if not isinstance(places, dict):
        raise ValueError("its header has no table of pieces")
    for name, shape in shapes.items():
        if name not in places:
            continue
        match places[name]:
            case [[*whole], [*start]] if all(type(number) is int for number in (*whole, *start)) and (
                len(whole) == len(start) == len(shape)
                and all(0 <= low <= size - count for size, low, count in zip(whole, start, shape, strict=True))
            ):
                pass
            case other:
                raise ValueError(f"its header has a piece of {name} at {str(other)[:80]}")
    return places


def _between(low: list[int], high: list[int], origin: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a - s, b - s) for a, b, s in zip(low, high, origin, strict=True))
