"""What this hardware does fast: devices, dtypes, the measured peak of its matrix product, memory.

Choices that touch training (device, dtype) depend on capability alone, never on a timing. The measured
peak only scales a displayed number (MFU) and is cached per machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quintic.core.errors import ConfigError, suggest
from quintic.core.files import atomic_write, cache_dir, sha256_bytes
from quintic.core.kernels import kernels_in_use

__all__ = [
    "DTYPES",
    "autocast",
    "describe",
    "fast_dtype",
    "free_memory_bytes",
    "matmul_peak",
    "matrix_units",
    "peak_memory_bytes",
    "pick_device",
    "pick_dtype",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str = "auto") -> torch.device:
    """Resolve a device name.

    Args:
        name: ``auto`` (CUDA if present, else CPU), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        ConfigError: The name is unknown or the device is absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.split(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present:
        raise ConfigError(f"unknown device {name!r}{suggest(kind, ['auto', *present])}")
    if not present[kind]:
        raise ConfigError(f"device {name!r} is not available on this machine; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not understood; write for example cuda:0") from error


def matrix_units() -> bool:
    """Whether this processor multiplies matrices in bfloat16 by units of their own (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for products in which training is quickest and safe: bfloat16 on CUDA from Ampere on, else float32.

    Float32 on every CPU: without matrix units torch's bfloat16 product is the slower one, and with them the products
    of the models that a CPU trains are too small, and their shapes change too often, to pay for the conversions.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return torch.float32


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto`` or one of :data:`DTYPES`.

    Raises:
        ConfigError: The name is unknown.
    """
    if name == "auto":
        return fast_dtype(device)
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}{suggest(name, ['auto', *DTYPES])}")
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype, *, cache: bool = True) -> torch.autocast:
    """Products in bfloat16 where that was chosen, weights and everything delicate in float32; else nothing.

    Args:
        device: Where to compute.
        dtype: What was chosen.
        cache: Whether the weights in bfloat16 are kept to the end for further use; not in training, which uses each
            once, and not where weights are divided among processes and only a part is to be here at a time.
    """
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache)


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instructions(device: torch.device) -> str:
    """What the processor or the graphics card offers to matrix products."""
    if device.type == "cuda":
        return "CUDA capability {}.{}".format(*torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return device.type
    amx = matrix_units()
    return torch.backends.cpu.get_cpu_capability() + (", AMX" if amx else ", no AMX")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Facts of this machine that belong beside any number measured on it."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "instructions": instructions(device),
        **({"kernels": kernels_in_use()} if device.type == "cpu" else {}),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matmul_peak(device: torch.device, dtype: torch.dtype, *, remeasure: bool = False) -> float:
    """Measured peak of the matrix product in FLOP/s: the best of a few sizes, about half a second.

    The figure is cached per machine, device, dtype, thread count and torch version.
    """
    facts = describe(device, dtype)
    key = sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:16]
    path = cache_dir("machine") / f"matmul-{key}.json"
    if path.exists() and not remeasure:
        try:
            return float(json.loads(path.read_text())["flops_per_second"])
        except (ValueError, KeyError, TypeError):
            pass  # a damaged cache entry is measured again
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a = torch.ones(size, size, device=device, dtype=dtype)
        out = a @ a
        deadline = time.perf_counter() + 0.15
        while time.perf_counter() < deadline:
            _synchronize(device)
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            _synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    atomic_write(path, json.dumps({"flops_per_second": best, **facts}, indent=1))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that is left at most: of the device for CUDA, else of the machine or the container.

    ``None`` where the system does not tell (other systems than Linux).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # "max", or no such limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return free


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory held so far: of the device for CUDA, else resident memory of this process.

    ``None`` where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux; what resource tells there includes the parent's memory
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
