"""Tensors in pieces: however they are cut into files they read back, or an error names what is missing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from quintic.core import CheckpointError
from quintic.engine.checkpoint import load_weights
from quintic.engine.pieces import Stored, held_here, part_files, save_held


def cut_up(folder, tensors, dim, rows):
    """Write the files of len(rows) shards; each holds so many indices of an axis of the tensors that have it."""
    start = 0
    for shard, count in enumerate(rows):
        held, places = {}, {}
        for name, tensor in tensors.items():
            if tensor.ndim > dim and count:
                held[name] = tensor.narrow(dim, start, count).clone()
                places[name] = (list(tensor.shape), [start if axis == dim else 0 for axis in range(tensor.ndim)])
            elif tensor.ndim <= dim and not shard:
                held[name] = tensor
        path = folder / f"model-{shard + 1:05d}-of-{len(rows):05d}.safetensors"
        save_file(held, path, metadata={"pieces": json.dumps(places)})
        start += count
    return part_files(folder, "model")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    dim=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
)
def test_every_cut_reads_back(tmp_path_factory, rows, dim, dtype):
    n = sum(rows)
    shape = (n, 3, 2) if dim == 0 else (3, n)
    tensors = {"a": (torch.randn(shape) * 3).to(dtype), "scalar": torch.tensor(2.5), "b": torch.ones(shape[: dim + 1])}
    stored = Stored(cut_up(tmp_path_factory.mktemp("cut"), tensors, dim, rows))
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read = stored.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_a_missing_file_is_an_error(tmp_path):
    model = nn.Linear(3, 4)
    files = cut_up(tmp_path, model.state_dict(), 0, [2, 2])
    with pytest.raises(CheckpointError, match="weight is not complete in model-00001-of-00002"):
        load_weights(files[:1], model)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors are not all the files of one model"):
        part_files(tmp_path, "model", ["model-00001-of-00002.safetensors"])
    with pytest.raises(CheckpointError, match="not all the files of one model"):
        part_files(tmp_path, "model", ["model-00001-of-00001.safetensors", "model.safetensors"])


def test_other_parts_and_other_files_are_left_out(tmp_path):
    for part in ("model", "model2", "average"):
        save_held(tmp_path, part, held_here({"x": torch.ones(1)}))
    (tmp_path / "model-1-of-2.safetensors.tmp").write_text("")
    assert [path.name for path in part_files(tmp_path, "model")] == ["model.safetensors"]


def test_one_shard_among_several_writes_what_is_whole_and_replicas_write_nothing(tmp_path):
    tensors = {"x": torch.ones(2)}
    assert held_here(tensors, shard=0, shards=2).tensors.keys() == {"x"}
    assert not held_here(tensors, shard=1, shards=2).tensors
    replica = held_here(tensors, shard=-1, shards=2)
    assert not replica.tensors and save_held(tmp_path, "model", replica) is None


def test_a_copy_does_not_follow_its_source():
    x = torch.ones(2)
    copied, shared = held_here({"x": x}, copy=True), held_here({"x": x})
    x.add_(1)
    assert copied.tensors["x"].tolist() == [1, 1] and shared.tensors["x"].tolist() == [2, 2]


HEADERS = {
    "no JSON": "{",
    "too deep": "[" * 200_000,
    "no table": "[1]",
    "half a place": {"x": [[2, 3]]},
    "no numbers": {"x": [[2, 3], ["a", "b"]]},
    "other axes": {"x": [[2, 3, 1], [0, 0, 0]]},
    "before the first": {"x": [[2, 3], [-1, 0]]},
    "beyond the last": {"x": [[2, 3], [1, 0]]},
    "larger than any memory": {"x": [[10**13, 3], [0, 0]]},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_an_error(tmp_path, kind):
    text = HEADERS[kind] if isinstance(HEADERS[kind], str) else json.dumps(HEADERS[kind])
    save_file({"x": torch.ones(2, 3)}, tmp_path / "model.safetensors", metadata={"pieces": text})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Stored([tmp_path / "model.safetensors"]).read("x")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Stored([tmp_path / "model.safetensors"])
