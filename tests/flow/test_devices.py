"""All that a flow does happens where its weights are, wherever torch puts tensors by default."""

import numpy as np
import torch
from tests.devices import meta_by_default

from quintic.flow import Guidance, LinearGuess, TarFlow, inpaint, plan_sampling, score_images


def test_nothing_follows_the_default_device():
    sizes = {"patch": 2, "width": 8, "blocks": 2, "layers": 1, "head_width": 8, "num_classes": 2}
    flow = TarFlow((1, 4, 4), **sizes, spline_bins=4, seed=0)
    images, known = torch.rand(2, 1, 4, 4), torch.arange(4) < 2
    with meta_by_default():
        guess = LinearGuess.fit(flow, 20, 1)
        made = [
            guess.matrices,
            flow.log_prob(images, 1),
            flow.interpolate(images[0], -images[0], 3, 1),
            inpaint(flow, images, known, 1, steps=2).images,
            *(flow.sample(2, 1, method=method, guess=guess).images for method in ("jacobi", plan_sampling(flow, 2))),
            *(
                flow.sample(2, 1, guidance=Guidance(1.0, schedule=way), method="sequential").images
                for way in ("constant", "growing")
            ),
        ]
        scores = score_images(flow, np.zeros((2, 4, 4, 1), np.uint8))
    assert {tensor.device.type for tensor in made} == {"cpu"} and np.isfinite(scores.outlier).all()
