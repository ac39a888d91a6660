"""Flows as files, and scores of images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from quintic.core import CheckpointError, ConfigError, DataError
from quintic.flow import load_flow, save_flow, score_images, shipped_flow, shipped_flow_names
from quintic.flow.outliers import png_bits_per_dim


def test_a_saved_flow_comes_back_in_half_precision(make_flow, tmp_path):
    flow = make_flow((3, 4, 4), dtype=torch.float32, num_classes=2, learned_prior=True)
    save_flow(flow, tmp_path / "flow.safetensors", licence="CC0")
    back = load_flow(tmp_path / "flow.safetensors")
    assert back.arguments == flow.arguments
    for name, tensor in flow.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.half().float())
    assert back.sample(2, 1).images.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"noise": "uniform", "preprocess": "logit", "levels": 4, "spline_bins": 5, "inner_width": 6},
        {"direction": "sampling", "sigma": 0.3, "width": 24, "head_width": 12, "layers": 1},
        {"volume_preserving": True, "learned_prior": True, "patch": 4, "blocks": 2},
    ],
)
def test_every_option_of_a_flow_is_in_its_file(make_flow, tmp_path, options):
    flow = make_flow((2, 4, 8), dtype=torch.float32, spread=0.02, **options).half().float()
    save_flow(flow, tmp_path / "flow.safetensors")
    back = load_flow(tmp_path / "flow.safetensors")
    levels = torch.randint(0, options.get("levels", 256), (3, 2, 4, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(back.bits_per_dim(levels), flow.bits_per_dim(levels))
    one, two = (each.sample(2, method="sequential") for each in (flow, back))
    assert torch.equal(one.images, two.images)
    assert not back.training


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    for name in ("other", "text", "absent"):
        with pytest.raises(CheckpointError):
            load_flow(tmp_path / f"{name}.safetensors")
    for place in (tmp_path, tmp_path / "other.safetensors"):  # as of a run
        with pytest.raises(CheckpointError, match="load_run"):
            load_flow(place)


def test_a_file_of_sizes_that_cannot_be_is_named(make_flow, tmp_path):
    flow = make_flow(dtype=torch.float32)
    flow.arguments["blocks"] = 0
    save_flow(flow, tmp_path / "flow.safetensors")
    with pytest.raises(CheckpointError, match=r"flow\.safetensors is not a file of a flow: blocks = 0"):
        load_flow(tmp_path / "flow.safetensors")


def test_shipped_flows_work():
    for name in shipped_flow_names():
        flow = shipped_flow(name)
        assert flow.sample(2, 0 if flow.num_classes else None).images.isfinite().all()
    with pytest.raises(ConfigError, match="comes with the package"):
        shipped_flow("no such flow")


def test_png_bits_are_those_of_the_file():
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    assert png_bits_per_dim(image) == len(file.getvalue()) * 8 / (8 * 6 * 3)
    assert png_bits_per_dim(np.zeros((64, 64, 1), np.uint8)) < 0.3


def test_scores_are_bits_minus_png(make_flow):
    flow = make_flow((1, 4, 6), num_classes=3, spread=0.01)
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 1), dtype=np.uint8)
    seen = []
    scores = score_images(flow, images, batch=3, progress=lambda done, n: seen.append((done, n)))
    with torch.no_grad():
        expected = flow.bits_per_dim(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert scores.bits_per_dim == pytest.approx(expected.numpy())
    assert scores.outlier == pytest.approx(expected.numpy() - [png_bits_per_dim(image) for image in images])
    assert seen == [(3, 7), (6, 7), (7, 7)]
    labelled = score_images(flow, images, np.arange(7) % 3)
    assert not np.allclose(labelled.bits_per_dim, scores.bits_per_dim)
    assert score_images(flow, images, np.arange(7) % 3, batch=2).outlier == pytest.approx(labelled.outlier)
    with torch.no_grad():
        several = flow.bits_per_dim(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), samples=2, seed=5)
    assert score_images(flow, images, samples=2, seed=5, batch=4).bits_per_dim == pytest.approx(several.numpy())
    for wrong in (images[:, :, :4], images[..., 0]):
        with pytest.raises(DataError):
            score_images(flow, wrong)
    with pytest.raises(DataError, match=r"with labels \(n,\), found \(8,\)"):
        score_images(flow, images, np.arange(8) % 3)
    for wrong in ({"batch": -1}, {"batch": 0}, {"samples": 0}):  # no number would be computed, and some returned
        with pytest.raises(ConfigError, match="expected a whole number, 1 or more"):
            score_images(flow, images, **wrong)
