"""What would make the host wait for an accelerator: numbers read from a tensor, or shapes that depend on them.

The meta device has no numbers, so what runs on it reads none.
"""

import pytest
import torch

from quintic.moe import routed


@pytest.mark.parametrize("normalize", [False, True])
def test_the_grouped_product_reads_no_counts(normalize, monkeypatch):
    monkeypatch.setattr(routed, "grouped_is_legal", lambda dtype, widths, device: device.type == "meta")
    x, gates = (torch.empty(40, size, dtype=torch.bfloat16, device="meta") for size in (16, 2))
    w_in, w_out = (torch.empty(4, *size, dtype=torch.bfloat16, device="meta") for size in ((16, 16), (16, 8)))
    ids = torch.empty(40, 2, dtype=torch.int64, device="meta")
    y, *kept = routed._forward(x, ids, gates, w_in, w_out, "silu", normalize)
    gradients = routed._backward(y, x, gates, w_in, w_out, *kept, "silu", normalize, 3 * [True])
    assert [t.shape for t in (y, *gradients)] == [t.shape for t in (x, x, gates, w_in, w_out)]
