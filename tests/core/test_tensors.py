"""Tensors on the disk: read back as they were, and what the disk refuses is the error that it is for every file."""

import errno

import pytest
import torch
from safetensors import SafetensorError, safe_open

from quintic.core import tensors
from quintic.core.tensors import save_tensors


def test_what_was_written_is_read(tmp_path):
    save_tensors({"a": torch.arange(3.0)}, tmp_path / "x", {"words": "b"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"words": "b"} and file.get_tensor("a").tolist() == [0.0, 1.0, 2.0]


def test_what_the_disk_refuses_is_an_os_error(tmp_path, monkeypatch):
    target = tmp_path / "nowhere" / "x"
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors({"a": torch.zeros(3)}, target)
    assert caught.value.filename == str(target)

    def refuse(words):
        def save(*_, **__):
            raise SafetensorError(words)

        monkeypatch.setattr(tensors, "save_file", save)

    for words in (
        "I/O error: No space left on device (os error 28)",
        'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',  # earlier versions
    ):
        refuse(f"Error while serializing: {words}")
        with pytest.raises(OSError, match="No space left") as caught:
            save_tensors({}, target)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    refuse("Error while serializing: header too large")
    with pytest.raises(SafetensorError, match="header"):
        save_tensors({}, target)
