"""Options of the experts reach the layers; the dense baseline has the active compute of the experts it replaces."""

from dataclasses import replace

import pytest
import torch

from quintic.core import ConfigError
from quintic.lm import LanguageModel, LMConfig, load_deepseek, save_deepseek
from quintic.moe import MoE


def test_options_reach_the_layers():
    config = replace(
        LMConfig(), score="softmax", select="sigmoid", normalize_gates=False, normalize_experts="rms", num_groups=4,
        top_groups=2,
    )  # fmt: skip
    model = LanguageModel(config, seed=0)
    router = model.blocks[1].ffn.router
    assert (router.score, router.select, router.normalize_gates) == ("softmax", "sigmoid", False)
    assert (router.num_groups, router.top_groups) == (4, 2) and model.blocks[1].ffn.normalize_experts == "rms"
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert model.blocks[1].ffn.router.weight.grad.abs().sum() > 0


def test_dense_baseline_has_the_active_parameters_of_the_experts():
    sparse, dense = LanguageModel(LMConfig(), seed=0), LanguageModel(replace(LMConfig(), dense=True), seed=0)
    assert not any(isinstance(module, MoE) for module in dense.modules())
    total, active = dense.num_parameters()
    routers = sum(layer.router.weight.numel() for layer in sparse.modules() if isinstance(layer, MoE))
    assert total == active == sparse.num_parameters()[1] - routers
    assert dense(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 264)


@pytest.mark.parametrize(
    "options", [{"score": "sigmoyd"}, {"normalize_experts": "l1"}, {"num_groups": 3}, {"top_k": 1}, {"top_groups": 2}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="lm"):
        replace(LMConfig(), **options)


def test_groups_survive_a_deepseek_folder_and_other_scores_are_refused(tmp_path):
    model = LanguageModel(replace(LMConfig(), num_groups=4, top_groups=2, route_scale=2.0), seed=0).eval()
    save_deepseek(model, tmp_path / "groups")
    ids = torch.arange(30).view(1, 30)
    torch.testing.assert_close(load_deepseek(tmp_path / "groups").eval()(ids), model(ids))
    with pytest.raises(ConfigError, match="sigmoid scores"):
        save_deepseek(LanguageModel(replace(LMConfig(), dense=True), seed=0), tmp_path / "dense")
