"""Every test gets a cache of its own session and leaves the user's alone."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    old = os.environ.get("QUINTIC_CACHE")
    os.environ["QUINTIC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["QUINTIC_CACHE"]
    else:
        os.environ["QUINTIC_CACHE"] = old
