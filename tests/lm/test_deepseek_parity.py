"""An independent truth: transformers' DeepSeek-V3 with the same weights gives the same logits and gradients."""

from dataclasses import replace

import pytest
import torch

from quintic.lm import LanguageModel, LMConfig

transformers = pytest.importorskip("transformers")


def counterpart(model: LanguageModel):
    """transformers' model with the weights of ours."""
    c = model.config
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
            moe_intermediate_size=c.d_expert, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_heads, n_shared_experts=c.num_shared, n_routed_experts=c.num_experts,
            routed_scaling_factor=c.route_scale, kv_lora_rank=c.kv_rank, q_lora_rank=c.q_rank or None,
            qk_rope_head_dim=c.qk_rope_dim, v_head_dim=c.v_dim, qk_nope_head_dim=c.qk_nope_dim, n_group=1,
            topk_group=1, num_experts_per_tok=c.top_k, first_k_dense_replace=c.num_dense_layers, norm_topk_prob=True,
            max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, rope_interleave=True,
            rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"}, tie_word_embeddings=False,
        )
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "lm_head.weight": model.head.weight,
        "model.norm.weight": model.norm.gain,
    }
    for index, block in enumerate(model.blocks):
        here, a = f"model.layers.{index}", block.attention
        weights |= {
            f"{here}.input_layernorm.weight": block.attention_norm.gain,
            f"{here}.post_attention_layernorm.weight": block.ffn_norm.gain,
            f"{here}.self_attn.kv_a_proj_with_mqa.weight": a.kv_down.weight,
            f"{here}.self_attn.kv_a_layernorm.weight": a.kv_norm.gain,
            f"{here}.self_attn.kv_b_proj.weight": a.kv_up.weight,
            f"{here}.self_attn.o_proj.weight": a.out.weight,
        }
        if c.q_rank:
            weights[f"{here}.self_attn.q_a_proj.weight"] = a.q_down.weight
            weights[f"{here}.self_attn.q_a_layernorm.weight"] = a.q_norm.gain
            weights[f"{here}.self_attn.q_b_proj.weight"] = a.q.weight
        else:
            weights[f"{here}.self_attn.q_proj.weight"] = a.q.weight
        dense = block.ffn if index < c.num_dense_layers else block.ffn.shared
        place = f"{here}.mlp" if index < c.num_dense_layers else f"{here}.mlp.shared_experts"
        gate, up = dense.gate_up.chunk(2)
        weights |= {
            f"{place}.gate_proj.weight": gate,
            f"{place}.up_proj.weight": up,
            f"{place}.down_proj.weight": dense.down,
        }
        if index >= c.num_dense_layers:
            weights[f"{here}.mlp.gate.weight"] = block.ffn.router.weight
            weights[f"{here}.mlp.gate.e_score_correction_bias"] = block.ffn.router.bias
            weights[f"{here}.mlp.experts.gate_up_proj"] = block.ffn.experts.gate_up
            weights[f"{here}.mlp.experts.down_proj"] = block.ffn.experts.down
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "rotary" not in name]
    return theirs.eval()


@pytest.mark.parametrize("q_rank", [0, 24])
def test_logits_and_gradients_agree(q_rank):
    config = replace(LMConfig(), q_rank=q_rank, route_scale=2.446, num_shared=2)
    model = LanguageModel(config, seed=0).eval()
    for block in model.blocks[config.num_dense_layers :]:
        block.ffn.router.bias.copy_(torch.linspace(-0.2, 0.2, config.num_experts))
    theirs = counterpart(model)
    ids = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, reference = model(ids), theirs(ids).logits
    assert (ours - reference).abs().max() < 1e-4
    for logits in (ours, reference):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    pairs = [
        (model.embedding.weight, theirs.model.embed_tokens.weight),
        (model.blocks[2].attention.kv_up.weight, theirs.model.layers[2].self_attn.kv_b_proj.weight),
        (model.blocks[1].ffn.router.weight, theirs.model.layers[1].mlp.gate.weight),
        (model.blocks[1].ffn.experts.down, theirs.model.layers[1].mlp.experts.down_proj),
    ]
    for ours_weight, their_weight in pairs:
        torch.testing.assert_close(ours_weight.grad, their_weight.grad, atol=1e-5, rtol=1e-3)
