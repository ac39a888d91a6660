"""Tests of C kernels run where there are any; where there should be, their absence is a failure (tests/core)."""

import pytest

from quintic.core.kernels import kernels_in_use

needs_kernels = pytest.mark.skipif(kernels_in_use() != "compiled", reason=f"kernels: {kernels_in_use()}")
