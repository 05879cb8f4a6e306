"""Mixtures of experts."""

from torch import nn
from transformers import (
    DbrxForCausalLM,
    GemmaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from . import plain
from .common import IDS, NARROW, SMALL, Case
from .renamed import published

GATE = "mlp.gate"
MIXTRAL = dict(SMALL, head_dim=16)
QWEN3 = dict(SMALL, head_dim=16, moe_intermediate_size=32)


def dbrx(layers, normalize):
    settings = dict(
        IDS,
        d_model=64,
        n_heads=4,
        n_layers=layers,
        max_seq_len=256,
        attn_config=dict(clip_qkv=0.5, kv_n_heads=2, rope_theta=5e5),
        ffn_config=dict(
            ffn_act_fn=dict(name="silu"),
            ffn_hidden_size=32,
            moe_num_experts=4,
            moe_top_k=2,
            moe_normalize_expert_weights=normalize,
        ),
        tie_word_embeddings=False,
    )

    def changed(part, **changes):
        return {part: dict(settings[part], **changes)}

    other = None if normalize else 1.0
    matters = (
        changed("attn_config", clip_qkv=1e3),
        changed("attn_config", rope_theta=1e4),
        changed("ffn_config", moe_normalize_expert_weights=other),
        changed("ffn_config", moe_top_k=1),
    )
    return Case(DbrxForCausalLM, settings, router=("router.layer", 2), matters=matters)


class Experts(nn.Module):
    """Mixtral's block where Gemma has an MLP."""

    def __init__(self, config):
        super().__init__()
        self.block_sparse_moe = MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_local_experts=config.num_local_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                hidden_act="gelu_pytorch_tanh",
            )
        )

    def forward(self, x):
        return self.block_sparse_moe(x)[0]


def gemmoe(config):
    model = GemmaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = Experts(config)
    return model


def gemmoe_published(config, state):
    state = {name.replace(".mlp.", "."): tensor for name, tensor in state.items()}
    more = dict(
        attention_bias=False,
        head_dim=config["head_dim"],
        # Means the form with the tangent, as in Gemma's first configurations.
        hidden_act="gelu",
        num_experts_per_tok=config["num_experts_per_tok"],
        num_local_experts=config["num_local_experts"],
        output_router_logits=False,
        rope_scaling=None,
        router_aux_loss_coef=0.01,
    )
    return published("GemmoeForCausalLM", config, **more), state


CASES = {
    "mixtral": Case(
        MixtralForCausalLM,
        dict(MIXTRAL, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2),
        router=("block_sparse_moe.gate", 2),
        matters=(dict(num_experts_per_tok=1), dict(num_experts_per_tok=3)),
    ),
    "mixtral4": Case(
        MixtralForCausalLM,
        dict(
            MIXTRAL,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
        tokens=48,
        router=("block_sparse_moe.gate", 2),
        matters=(dict(sliding_window=9), dict(sliding_window=None)),
    ),
    "qwen2-moe": Case(
        Qwen2MoeForCausalLM,
        dict(
            NARROW,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            norm_topk_prob=False,
        ),
        router=(GATE, 2),
        matters=(dict(norm_topk_prob=True), dict(num_experts_per_tok=3)),
    ),
    # Only the second of three layers has experts.
    "qwen2-moe-mixed": Case(
        Qwen2MoeForCausalLM,
        dict(
            NARROW,
            num_hidden_layers=3,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=32,
            norm_topk_prob=False,
            decoder_sparse_step=2,
        ),
        router=(GATE, 2),
        matters=(dict(norm_topk_prob=True),),
    ),
    # The second of three layers has none.
    "qwen3-moe": Case(
        Qwen3MoeForCausalLM,
        dict(
            QWEN3,
            num_hidden_layers=3,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
        router=(GATE, 3),
        matters=(dict(norm_topk_prob=False), dict(num_experts_per_tok=2)),
    ),
    "qwen3-moe-raw": Case(
        Qwen3MoeForCausalLM,
        dict(
            QWEN3,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=False,
        ),
        router=(GATE, 2),
        matters=(dict(norm_topk_prob=True),),
    ),
    "dbrx": dbrx(2, 1.0),
    "dbrx-raw": dbrx(1, None),
    "olmoe": Case(
        OlmoeForCausalLM,
        dict(
            NARROW,
            intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
        router=(GATE, 2),
        matters=(dict(norm_topk_prob=True),),
    ),
    "gemmoe": Case(
        GemmaForCausalLM,
        dict(
            SMALL,
            head_dim=16,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        ),
        build=gemmoe,
        publish=gemmoe_published,
        check=plain.read_by(plain.GemMoe),
        embedding_std=0.05,
        router=("block_sparse_moe.gate", 2),
        matters=(dict(num_experts_per_tok=1),),
    ),
}
