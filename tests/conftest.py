"""Every test gets a cache of its own session and leaves the user's alone."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Processes that share the cores: each takes its part, and so does what it starts. Read when torch is imported.
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    old = os.environ.get("QUINTIC_CACHE")
    os.environ["QUINTIC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["QUINTIC_CACHE"]
    else:
        os.environ["QUINTIC_CACHE"] = old


@pytest.fixture(autouse=True)
def threads_are_left_alone():
    """The number of threads decides the last bits of a sum: a test that changes it must put it back."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if before is not None:
        assert torch.get_num_threads() == before
