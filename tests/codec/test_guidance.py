import numpy as np
import pytest
import torch
from tests.codec.toys import picture, smooth_model, toy_codec

from quintic.codec import Plan, paper_plan, psnr
from quintic.codec.guidance import (
    Blurred,
    Greyed,
    Masked,
    Shrunk,
    blur_matrix,
    classifier_direction,
    classifier_free_direction,
    generate,
    guide,
)
from quintic.codec.tiles import to_image, to_values
from quintic.core import ConfigError
from quintic.diffusion import NetworkDenoiser, UNet


def observations(x):
    """Every operator on a picture, and the best guess without a model."""
    h, w, _ = x.shape
    known = np.indices((h, w)).sum(0) % 2 == 0
    small = x.reshape(h // 2, 2, w // 2, 2, -1).mean((1, 3))
    down, across = blur_matrix(h, 1.2), blur_matrix(w, 1.2)
    blurred = np.einsum("ij,jkc,lk->ilc", down, x, across)
    return {
        "inpaint": (Masked(np.where(known[:, :, None], x, 9.0), known), np.where(known[:, :, None], x, 0.0)),
        "enlarge": (Shrunk(small, 2), None),
        "deblur": (Blurred(blurred, 1.2), None),
    }


def test_a_blur_keeps_what_is_even_and_is_that_of_scipy_within():
    ndimage = pytest.importorskip("scipy.ndimage")
    assert np.allclose(blur_matrix(20, 1.5).sum(1), 1.0)
    x = np.random.default_rng(0).normal(size=(30, 26))
    ours = blur_matrix(30, 1.2) @ x @ blur_matrix(26, 1.2).T
    theirs = ndimage.gaussian_filter(x, 1.2, truncate=8.0)
    assert np.allclose(ours[10:20, 10:16], theirs[10:20, 10:16], atol=1e-6)


@pytest.mark.parametrize("task", ["inpaint", "enlarge", "deblur"])
def test_what_is_seen_in_part_is_restored_and_compressed_at_once(task):
    codec, original = toy_codec(12), picture(24, 18)
    observed, _ = observations(to_values(original))[task]
    made = codec.restore(observed, target_bytes=250)
    assert len(made.data) <= 250
    assert codec.decode(made.data).tobytes() == made.image.tobytes()
    assert psnr(made.image, original) > 24  # the flat picture has 14


def test_half_the_pixels_restore_the_other_half():
    codec, original = toy_codec(12), picture(12, 12)
    x = to_values(original)
    observed, filled = observations(x)["inpaint"]
    made = codec.restore(observed, target_bytes=150)
    unknown = np.indices((12, 12)).sum(0) % 2 == 1
    errors = [np.square(to_values(image) - x)[unknown].mean() for image in (made.image, to_image(filled, "L"))]
    assert errors[0] < 0.3 * errors[1]


def test_luma_is_kept_by_colourisation():
    codec, original = toy_codec(12, 3), picture(12, 12, "RGB")
    grey = to_values(original) @ np.array([0.299, 0.587, 0.114])
    made = codec.restore(Greyed(grey[:, :, None]), target_bytes=200)
    again = to_values(made.image) @ np.array([0.299, 0.587, 0.114])
    assert made.image.mode == "RGB" and np.square(again - grey).mean() < 0.01


@pytest.mark.parametrize("task", ["inpaint", "enlarge", "deblur"])
def test_a_residual_is_zero_for_the_truth_and_reduces_the_error_of_others(task):
    x = to_values(picture(12, 8, "RGB"))
    observed, _ = observations(x)[task]
    np.testing.assert_allclose(observed.residual(x), 0.0, atol=1e-9)
    start = np.zeros_like(x)
    moved = start + observed.residual(start)
    assert np.square(moved - x).sum() < np.square(start - x).sum()
    np.testing.assert_allclose(observed.residual(moved), 0.0, atol=0.25)


def test_impossible_observations_are_refused():
    y = np.zeros((4, 4, 3))
    for make in (
        lambda: Masked(y, np.ones((3, 3), bool)),
        lambda: Shrunk(y, 1),
        lambda: Greyed(y),
        lambda: Blurred(y, 0.0),
        lambda: Blurred(y, float("nan")),
        lambda: Blurred(y, 1.0, float("inf")),
    ):
        with pytest.raises(ConfigError):
            make()


def test_the_inverse_of_a_blur_is_hardly_tamed_where_the_blur_does_nothing():
    even = np.full((6, 5, 1), 0.5)
    np.testing.assert_allclose(Blurred(even, 1.2).residual(np.zeros_like(even)), even, atol=0.02)


def test_counts_of_images_that_mean_nothing_are_refused():
    model, plan = smooth_model(8), paper_plan(4, 8)
    for counts in ({"count": 0}, {"count": 2, "batch": 0}, {"count": 2, "batch": -1}):
        with pytest.raises(ConfigError, match=r"(count|batch) = -?\d; expected a whole number, 1 or more"):
            generate(model, plan, **counts)
    with pytest.raises(ConfigError, match="count = 0"):
        guide(model, plan, 0, lambda x0, x, log_snr: x0)


def test_a_classifier_guides_codes_towards_its_class():
    """Class: brighter than the mean. The chain runs unguided, so that codes alone decode to the same."""
    model, plan = smooth_model(8), paper_plan(12, 64)

    def bright(x0):
        return torch.nn.functional.logsigmoid(4.0 * x0.mean((1, 2, 3)))

    codes, guided = guide(model, plan, 12, classifier_direction(bright, 30.0), seed=1)
    _, free = guide(model, plan, 12, classifier_direction(bright, 0.0), seed=1)
    _, hard = guide(model, plan, 1, classifier_direction(bright), draw="argmax")
    assert guided.mean() > free.mean() + 0.1 and hard.mean() > free.mean() + 0.1
    assert len({image.tobytes() for image in guided}) == 12
    from quintic.codec.chain import replay, run_chain

    np.testing.assert_array_equal(run_chain(model, plan, 12, replay(plan, codes)), guided)


def test_classifier_free_guidance_needs_no_class_to_decode():
    arguments = {"shape": (1, 8, 8), "width": 8, "levels": 1, "blocks": 1, "patch": 2, "heads": 0, "num_classes": 2}
    net = UNet(**arguments, seed=0)
    for tensor in net.parameters():
        torch.nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(tensor.numel()))
    denoiser, plan = NetworkDenoiser(net, "x0", arguments), paper_plan(8, 256)
    made = [guide(denoiser, plan, 1, classifier_free_direction(denoiser, label), draw="argmax") for label in (0, 1)]
    assert any((a != b).any() for a, b in zip(made[0][0], made[1][0], strict=True))
    with pytest.raises(ConfigError, match="rule single"):
        guide(denoiser, Plan((-9, 9), (2,)), 1, classifier_free_direction(denoiser, 0), draw="softmax")


def spread_error(plan, count=250):
    """Distance of the generated covariance from the model's, relative: 0 for perfect sampling of a Gaussian."""
    model = smooth_model(6)
    _, images = generate(model, plan, count, batch=count)
    x = images.reshape(count, -1)
    true = (model._basis * model._variances.float()) @ model._basis.T
    mean, covariance = x.mean(0), np.cov(x.T)
    # Frechet distance between Gaussians.
    values, vectors = np.linalg.eigh(true.numpy().astype(float))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance @ root).clip(0)
    return float(np.square(mean).sum() + np.trace(covariance) + values.sum() - 2 * np.sqrt(cross).sum()) / values.sum()


def test_random_codes_generate_and_a_shared_book_needs_far_more_atoms():
    """The post: separate codebooks of 64 atoms sample about as DDPM does; a shared one needs thousands."""
    two, separate = (spread_error(paper_plan(60, k)) for k in (2, 64))
    shared, shared_many = (spread_error(paper_plan(60, k, shared=True)) for k in (64, 8192))
    assert two > 3 * separate and separate < 0.07
    assert shared > 2 * separate and shared_many < shared / 3
