"""Compiling and loading of C kernels: where they are to be had, and what is said where they are not."""

import os
import platform
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.kernels import needs_kernels

import quintic
from quintic.core import kernels

SOURCES = sorted(Path(quintic.__file__).parent.rglob("*.c"))
ROOT = Path(__file__).parents[2]
COMPILERS = [path for name in ("gcc", "clang") if (path := shutil.which(name))]
ASK = "from quintic.core.kernels import kernels_in_use; print(kernels_in_use())"


def ask(code=ASK, **environment):
    """What a new process prints and says, with these variables; "" takes one out."""
    wanted = {**os.environ, **environment}
    wanted = {name: value for name, value in wanted.items() if value != ""}
    done = subprocess.run([sys.executable, "-c", code], env=wanted, capture_output=True, text=True, timeout=100)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    or not COMPILERS,
    reason="kernels are for x86-64 with AVX2 on Linux, with a C compiler",
)
def test_they_are_in_use_where_they_can_be(tmp_path):
    """A defect of the C code must not hide behind torch's operators."""
    assert SOURCES == kernels._sources() != []
    assert ask(QUINTIC_KERNELS="", CC="", QUINTIC_CACHE=str(tmp_path)) == "compiled"


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="they are for x86-64")
def test_they_compile_without_a_warning(source, level, compiler, tmp_path):
    strict = ["-Wall", "-Wextra", "-Werror", f"-march={level}", f"-I{kernels._HEADERS}"]
    made = subprocess.run(
        [compiler, *kernels._FLAGS, *strict, "-shared", "-o", str(tmp_path / "made.so"), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_they_can_be_declined():
    assert ask(QUINTIC_KERNELS="torch") == "torch (QUINTIC_KERNELS=torch)"


def test_a_wrong_wish_is_an_error():
    assert "must be auto, torch or compiled, found 'yes'" in ask(QUINTIC_KERNELS="yes")


@needs_kernels
def test_without_a_compiler_torch_does_it_and_says_why(tmp_path):
    assert ask(CC="no-such-compiler") == "torch (there is no C compiler (no-such-compiler) on the path)"
    assert ask(CC="", PATH=str(tmp_path)) == "torch (there is no C compiler (cc, gcc, clang) on the path)"
    said = ask(CC="no-such-compiler", QUINTIC_KERNELS="compiled")
    assert "QUINTIC_KERNELS=compiled, but there is no C compiler" in said


@needs_kernels
def test_a_compiler_that_fails_leaves_nothing(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no space for it" >&2\nexit 1\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    cache = tmp_path / "cache"
    assert ask(CC=str(broken), QUINTIC_CACHE=str(cache)) == f"torch ({broken} does not compile them: no space for it)"
    assert list((cache / "kernels").iterdir()) == []


@needs_kernels
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    said = ask(QUINTIC_CACHE=str(tmp_path / "file"))
    assert said.startswith("torch (the cache folder")


@needs_kernels
def test_they_are_compiled_once_even_by_several_at_once(tmp_path):
    environment = {**os.environ, "QUINTIC_CACHE": str(tmp_path)}
    several = [subprocess.Popen([sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=100)[0].decode().strip() for process in several] == 3 * ["compiled"]
    (made,) = (tmp_path / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    assert ask(QUINTIC_CACHE=str(tmp_path)) == "compiled"
    assert made.stat().st_mtime_ns == before


@needs_kernels
def test_a_damaged_file_in_the_cache_is_said(tmp_path):
    assert ask(QUINTIC_CACHE=str(tmp_path)) == "compiled"
    (made,) = (tmp_path / "kernels").iterdir()
    made.write_bytes(b"not a library")
    assert ask(QUINTIC_CACHE=str(tmp_path)).startswith("torch (")


@needs_kernels
def test_room_is_the_threads_own_and_grows(monkeypatch):
    """The same memory every time, until more is needed; what is too much is not kept; other threads have theirs."""
    found = kernels.Kernels(kernels.load_kernels()._library)
    x, gain, g = torch.randn(100, 8), torch.ones(8), torch.randn(100, 8)
    r, dx, dgain = torch.ones(100), torch.empty(100, 8), torch.empty(8)

    def back(rows=100):
        assert found.call("rms_norm_backward", rows, 8, x, gain, r, g, None, dx, dgain) == 0
        return found._room.address, found._room.size

    few = back(10)
    more = back()
    assert 0 < few[1] < more[1] and back(10) == back() == more
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(back).result()[0] != more[0]
    with torch.device("meta"):
        other = kernels.Kernels(found._library)
        assert other.call("rms_norm_backward", 100, 8, x, gain, r, g, None, dx, dgain) == 0
    monkeypatch.setattr(kernels, "_KEPT", 1)
    expected, found = dgain.clone(), kernels.Kernels(found._library)
    assert back() == (0, 0) and torch.equal(dgain, expected)


CHECK = """
import torch
from quintic.core.kernels import kernels_in_use
from quintic.moe.routed import routed_experts
from quintic.moe.router import argtop
from quintic.lm.norm import rms_norm
assert torch.backends.cpu.get_cpu_capability() == "AVX2" and kernels_in_use() == "compiled"
g = torch.Generator().manual_seed(0)
for n, d, f, e, k in ((50, 33, 19, 4, 2), (300, 64, 48, 5, 3)):
    x, w_in, w_out = torch.randn(n, d), torch.randn(e, 2 * f, d), torch.randn(e, d, f)
    ids, gates = torch.rand(n, e).argsort(1)[:, :k], torch.rand(n, k)
    both = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, gates, w_in, w_out)]
        y = routed_experts(leaves[0], ids, *leaves[1:])
        z = rms_norm(y, torch.ones(d, dtype=dtype), 1e-6)
        both.append([y, z, *torch.autograd.grad(z[:, 0].sum(), leaves)])
    for a, b in zip(*both):
        assert (a - b).norm() < 1e-4 * b.norm()
scores = torch.randint(0, 5, (40, 37)).float()
assert torch.equal(argtop(scores, 9), scores.sort(dim=-1, descending=True, stable=True).indices[:, :9])
print("right")
"""


@needs_kernels
def test_with_shorter_vectors():
    assert ask(CHECK, ATEN_CPU_CAPABILITY="avx2") == "right"


@needs_kernels
def test_the_fused_steps_with_shorter_vectors():
    tests = [str(ROOT / "tests" / name) for name in ("lm/test_mla_kernel.py", "moe/test_router_kernel.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "float64 or parts", *tests]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "QUINTIC_KERNELS": "compiled"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def sanitizer(name):
    """Path of gcc's runtime of a sanitizer; None where there is none."""
    if (gcc := shutil.which("gcc")) is None:
        return None
    found = Path(subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())
    return found if found.is_absolute() else None


_SANITIZED = [
    "moe/test_expert_kernels.py", "moe/test_router_kernel.py", "lm/test_attention_kernel.py", "lm/test_mla_kernel.py",
    "lm/test_norm_kernel.py",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_kernels
@pytest.mark.skipif(sanitizer("libasan.so") is None, reason="no address sanitizer of gcc")
def test_they_stay_within_their_memory(tmp_path):
    """Their tests of odd sizes under the address and undefined-behaviour sanitizers."""
    environment = {
        **os.environ,
        "CC": "gcc -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": f"{sanitizer('libasan.so')} {sanitizer('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "QUINTIC_CACHE": str(tmp_path),
        "QUINTIC_KERNELS": "compiled",
    }
    tests = [str(ROOT / "tests" / name) for name in _SANITIZED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "float64 or stable_sort", *tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
