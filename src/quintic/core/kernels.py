"""C kernels for the CPU, compiled where they run: in a few seconds, once, into the cache.

A file ``NAME.c`` beside the Python that calls it does in one pass over memory what torch's operators do in many; all of
them are one library. It needs a 64-bit x86 processor with AVX2 on Linux and a C compiler (``$CC``, ``cc``, ``gcc`` or
``clang``); elsewhere, or with ``QUINTIC_KERNELS=torch``, the same numbers come from torch's operators, equal to
rounding. Which it is does not change within a process, is a fact of the machine that a run writes down, and is said
when a training begins.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quintic.core.errors import ConfigError
from quintic.core.files import cache_dir, sha256_bytes

__all__ = ["Kernels", "fits_kernels", "found_kernels", "kernels_in_use", "load_kernels"]

VARIABLE = "QUINTIC_KERNELS"
_HEADERS = Path(__file__).parent
_PACKAGE = _HEADERS.parent
_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_SECONDS = 120
_PLAIN = (Tensor, nn.Parameter)
_KEPT = 2**25  # numbers: 128 MiB


class Unavailable(Exception):
    """Why kernels cannot be had here."""


class _Room(threading.local):
    """Memory of a thread that kernels write in; nothing in it is ever read by another call."""

    tensor: Tensor | None = None
    address = size = 0

    def grow(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.float32, device="cpu")
        self.address, self.size = self.tensor.data_ptr(), size


class Kernels:
    """The functions of a library.

    Args:
        library: It, loaded.

    Each takes torch's number of threads, room to work in and its own arguments, and returns 0; or how many numbers of
    room it needs, if there are fewer, and has done nothing; or less than 0. Up to some size the room is the same memory
    every time: what was written there is in the cache still, and the system hands out nothing.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}
        self._room = _Room()

    def call(self, name: str, *arguments: float | Tensor | None) -> int:
        """Call a function of ``long``, ``double`` and pointers.

        Args:
            name: Of the function.
            arguments: Its own: an int, a float, a tensor for the address of its first element, None for no address.

        Returns:
            What it returns: 0, or less if it refuses what it was given.
        """
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        function = self._functions.get(name) or self._declare(name, arguments)
        room, threads = self._room, torch.get_num_threads()
        answer = function(threads, room.address, room.size, *plain)
        if answer > 0:
            if answer > _KEPT:
                room = _Room()
            room.grow(answer)
            answer = function(threads, room.address, room.size, *plain)
        return answer

    def _declare(self, name: str, arguments: tuple[float | Tensor | None, ...]) -> Any:
        function = self._functions[name] = getattr(self._library, name)
        kinds = {int: ctypes.c_long, float: ctypes.c_double}
        function.argtypes = [
            ctypes.c_long, ctypes.c_void_p, ctypes.c_long,
            *(kinds.get(type(a), ctypes.c_void_p) for a in arguments),
        ]  # fmt: skip
        function.restype = ctypes.c_long
        return function


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether kernels read all of these: float32, on a CPU, with their numbers where they say.

    Not in a graph that the compiler makes, which fuses torch's operators, nor a subclass, which means something else.
    """
    if torch.compiler.is_compiling():
        return False
    return all(type(t) in _PLAIN and t.is_cpu and t.dtype == torch.float32 for t in tensors)


def load_kernels() -> Kernels | None:
    """The kernels; None where there are none, and torch's operators are to be used.

    Raises:
        ConfigError: ``QUINTIC_KERNELS`` is neither of auto, torch and compiled; or it is compiled, and they cannot be.
    """
    return _found()[0]


def found_kernels() -> Kernels:
    """Those of :func:`load_kernels`, where it is known that there are some."""
    kernels = load_kernels()
    assert kernels is not None
    return kernels


def kernels_in_use() -> str:
    """``compiled``, or ``torch`` with the reason in brackets.

    Raises:
        ConfigError: As :func:`load_kernels`.
    """
    kernels, why = _found()
    return "compiled" if kernels is not None else f"torch ({why})"


@functools.cache
def _found() -> tuple[Kernels | None, str]:
    """Kernels or None, and why None."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "torch", "compiled"):
        raise ConfigError(f"{VARIABLE} must be auto, torch or compiled, found {wanted!r}")
    if wanted == "torch":
        return None, f"{VARIABLE}=torch"
    try:
        return Kernels(_library(_sources())), ""
    except Unavailable as error:
        if wanted == "compiled":
            raise ConfigError(f"{VARIABLE}=compiled, but {error}") from error
        return None, str(error)


def _sources() -> list[Path]:
    return sorted(_PACKAGE.rglob("*.c"))


def _library(sources: Sequence[Path]) -> ctypes.CDLL:
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability())
    if sys.platform != "linux" or platform.machine() != "x86_64" or level is None:
        raise Unavailable("they are for x86-64 with AVX2 on Linux")
    entries = _thread_entries()
    compiler = _compiler()
    command = [*compiler, f"-march={level}", *_FLAGS]
    texts = [path.read_text(encoding="utf-8") for path in (*sorted(_PACKAGE.rglob("*.h")), *sources)]
    key = sha256_bytes("\0".join([*texts, *command, _run([*compiler, "--version"])]).encode())[:20]
    try:
        path = cache_dir("kernels") / f"{key}.so"
        if not path.exists():
            _compile([*command, f"-I{_HEADERS}"], sources, path)
        if path.stat().st_uid not in (os.getuid(), 0):
            raise Unavailable(f"{path} belongs to somebody else")
        library = ctypes.CDLL(str(path))
    except (OSError, ConfigError) as error:
        raise Unavailable(str(error)) from error
    library.use_threads(*entries)
    return library


def _thread_entries() -> list[ctypes.c_void_p]:
    """Addresses of the functions of torch's OpenMP runtime that start threads and number them."""
    try:  # as the linker finds them for torch, be it another runtime that was loaded first
        found = ctypes.CDLL(None)
        return [ctypes.cast(f, ctypes.c_void_p) for f in (found.GOMP_parallel, found.omp_get_thread_num)]
    except (OSError, AttributeError) as error:
        raise Unavailable("torch's threads are not those of GNU's OpenMP") from error


def _compiler() -> list[str]:
    names = [os.environ["CC"]] if os.environ.get("CC") else _COMPILERS
    for name in names:
        if (words := name.split()) and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise Unavailable(f"there is no C compiler ({', '.join(names)}) on the path")


def _compile(command: Sequence[str], sources: Sequence[Path], path: Path) -> None:
    """Under another name first: several processes may do it at once."""
    if sys.stderr.isatty():
        print("compiling kernels for this processor: once, some seconds", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{index}.o") for index in range(len(sources))]
        one = [[*command, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
        list(pool.map(_run, one))
        made = Path(folder) / path.name
        _run([*command, "-shared", *objects, "-o", str(made)])
        os.replace(made, path)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        words = next((line for line in said if "error" in line), said[0])
        raise Unavailable(f"{command[0]} does not compile them: {words}")
    return done.stdout
