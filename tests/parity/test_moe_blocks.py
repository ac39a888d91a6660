"""Independent truths: transformers' MoE blocks of DeepSeek-V3 and Mixtral, same weights in, same numbers out."""

import pytest
import torch

from quintic.core.initial import initialize_
from quintic.moe import MoE, NoBalance

pytest.importorskip("transformers")

from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock


def deepseek(layer: MoE) -> DeepseekV3MoE:
    experts, width, hidden = layer.experts.down.shape
    router = layer.router
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=width, moe_intermediate_size=hidden, n_routed_experts=experts, num_experts_per_tok=router.top_k,
            n_shared_experts=layer.shared.down.shape[1] // hidden, n_group=router.num_groups,
            topk_group=router.top_groups, norm_topk_prob=router.normalize_gates, routed_scaling_factor=router.scale,
        )
    )  # fmt: skip
    gate, up = layer.shared.gate_up.chunk(2)
    weights = {
        "gate.weight": router.weight,
        "gate.e_score_correction_bias": router.bias,
        "experts.gate_up_proj": layer.experts.gate_up,
        "experts.down_proj": layer.experts.down,
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": layer.shared.down,
    }
    theirs.load_state_dict(weights)
    return theirs


def mixtral(layer: MoE) -> MixtralSparseMoeBlock:
    experts, width, hidden = layer.experts.down.shape
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_local_experts=experts,
            num_experts_per_tok=layer.router.top_k,
        )
    )
    weights = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.gate_up,
        "experts.down_proj": layer.experts.down,
    }
    theirs.load_state_dict(weights)
    return theirs


def compare(layer: MoE, theirs: torch.nn.Module, pairs, width: int) -> None:
    """Outputs within 1e-5 in float32, and the gradients of input and weights."""
    x = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(2))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, reference = layer(one), theirs(two)
    assert (ours - reference).abs().max() <= 1e-5
    for y in (ours, reference):
        (y * weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)
    for own, their in pairs:
        torch.testing.assert_close(own.grad, their.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("experts", "k", "shared", "groups", "kept"),
    [(8, 2, 1, 1, 1), (64, 6, 2, 1, 1), (32, 4, 1, 8, 4), (16, 8, 1, 4, 2)],
)
def test_deepseek_v3_block(experts, k, shared, groups, kept):
    """Groups as in DeepSeek-V3, whose best are found by the sum of two biased scores."""
    layer = MoE(
        48, 32, experts, k, num_shared=shared, num_groups=groups, top_groups=kept, route_scale=2.5, initialize=False
    )
    initialize_(layer, 0)
    layer.router.bias.copy_(0.3 * torch.randn(experts, generator=torch.Generator().manual_seed(0)))
    theirs = deepseek(layer)
    pairs = [
        (layer.router.weight, theirs.gate.weight),
        (layer.experts.gate_up, theirs.experts.gate_up_proj),
        (layer.experts.down, theirs.experts.down_proj),
        (layer.shared.down, theirs.shared_experts.down_proj.weight),
    ]
    compare(layer, theirs, pairs, 48)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4), (4, 4)])
def test_mixtral_block(experts, k):
    layer = MoE(
        48, 64, experts, k, num_shared=0, score="softmax", route_scale=1.0, balance=NoBalance(), initialize=False
    )
    initialize_(layer, 0)
    theirs = mixtral(layer)
    pairs = [
        (layer.router.weight, theirs.gate.weight),
        (layer.experts.gate_up, theirs.experts.gate_up_proj),
        (layer.experts.down, theirs.experts.down_proj),
    ]
    compare(layer, theirs, pairs, 48)
