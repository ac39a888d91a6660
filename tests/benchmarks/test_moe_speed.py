"""The speed benchmark of the experts runs at a tiny size, and its contestants compute the same thing."""

import pytest
import torch
from benchmarks import moe_speed

from quintic.core.initial import initialize_
from quintic.moe import MoE, NoBalance

pytest.importorskip("transformers")


def test_a_tiny_shape_and_its_section():
    row = moe_speed.one((32, 8, 4, 4, 2), 0.0)
    assert row["zipf MaxVio"] > 0.2 and all(value > 0 for value in row["ms"].values())
    machine = {"cpu": "a cpu", "threads": 1, "torch": "2"}
    text = moe_speed.section({"machine": machine, "shapes": [row]})
    assert f"| 32, 8, 4, 4, 2 | {row['ms']['layer']:.1f} | {row['layer / dense']:.2f} |" in text


def test_contestants_agree():
    layer = MoE(8, 4, 4, 2, num_shared=0, route_scale=1.0, balance=NoBalance())
    initialize_(layer, 0)
    x = torch.randn(20, 8)
    for implementation in ("eager", "grouped_mm"):
        torch.testing.assert_close(moe_speed.Foreign(layer, implementation)(x), layer(x))


def test_loads():
    counts = torch.bincount(moe_speed.balanced_ids(64, 8, 2).flatten())
    assert counts.tolist() == [16] * 8
    ids = moe_speed.zipf_ids(500, 8, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    assert torch.bincount(ids.flatten())[0] > 3 * torch.bincount(ids.flatten())[7]
