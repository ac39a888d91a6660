"""Flows with weights that make every part of them matter."""

import pytest
import torch

from quintic.flow import TarFlow


@pytest.fixture(scope="session")
def make_flow():
    def make(shape=(1, 4, 6), *, dtype=torch.float64, spread=0.05, seed=0, **options):
        options = {"patch": 2, "width": 16, "blocks": 3, "layers": 2, "head_width": 8, **options}
        flow = TarFlow(shape, **options, seed=0).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in flow.named_parameters():
                scale = spread if ".leave." in name else 0.1
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += scale * noise.to(dtype)
        return flow.eval()

    return make
