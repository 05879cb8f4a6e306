"""Dense models that transformers reads and writes as they are published."""

from transformers import (
    ArceeForCausalLM,
    Ernie4_5ForCausalLM,
    Exaone4ForCausalLM,
    Glm4ForCausalLM,
    GlmForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MinistralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    OlmoForCausalLM,
    SeedOssForCausalLM,
    SmolLM3ForCausalLM,
    StableLmForCausalLM,
)

from .common import BASE, NARROW, SMALL, Case

FULL, SLIDING = "full_attention", "sliding_attention"
GLM = dict(
    NARROW,
    head_dim=32,
    partial_rotary_factor=0.5,
    attention_bias=True,
)
WIDE = dict(BASE, head_dim=16)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
STABLE = dict(layer_norm_eps=1e-5, partial_rotary_factor=0.25)

CASES = {
    "arcee": Case(
        ArceeForCausalLM,
        dict(NARROW, rope_scaling=YARN, attention_bias=True, mlp_bias=True),
        matters=(
            dict(hidden_act="relu"),
            dict(rope_scaling=None),
            dict(attention_bias=False),
            dict(mlp_bias=False),
        ),
    ),
    "ernie4.5": Case(
        Ernie4_5ForCausalLM,
        dict(
            SMALL,
            head_dim=16,
            rope_scaling=dict(rope_type="linear", factor=4.0),
            use_bias=True,
            tie_word_embeddings=True,
        ),
        matters=(
            dict(rope_scaling=None),
            dict(rope_theta=1e4),
            dict(use_bias=False),
        ),
    ),
    "glm": Case(GlmForCausalLM, GLM, matters=(dict(partial_rotary_factor=1.0),)),
    "glm4": Case(
        Glm4ForCausalLM,
        GLM | WIDE,
        matters=(dict(partial_rotary_factor=1.0), dict(attention_bias=False)),
    ),
    "granite": Case(
        GraniteForCausalLM,
        dict(
            BASE,
            embedding_multiplier=3.0,
            attention_multiplier=0.15,
            residual_multiplier=0.4,
            logits_scaling=2.5,
            tie_word_embeddings=True,
        ),
        matters=(
            dict(embedding_multiplier=1.0),
            dict(attention_multiplier=0.25),
            dict(residual_multiplier=1.0),
            dict(logits_scaling=1.0),
        ),
    ),
    # Within its context a dynamic table is the plain one.
    "llama-dynamic": Case(
        LlamaForCausalLM,
        dict(SMALL, head_dim=16, rope_scaling=dict(rope_type="dynamic", factor=2.0)),
        matters=(dict(rope_scaling=dict(rope_type="linear", factor=2.0)),),
    ),
    "olmo": Case(
        OlmoForCausalLM,
        dict(NARROW, clip_qkv=1.0),
        matters=(dict(clip_qkv=None),),
    ),
    "olmo2": Case(
        Olmo2ForCausalLM,
        dict(BASE, intermediate_size=32, rope_theta=5e5),
        matters=(dict(rope_theta=1e4),),
    ),
    "olmo3": Case(
        Olmo3ForCausalLM,
        dict(
            NARROW,
            # The fourth layer sees all; the scaling is for it alone.
            num_hidden_layers=4,
            sliding_window=8,
            rope_scaling=YARN,
        ),
        tokens=48,
        matters=(
            dict(sliding_window=9),
            dict(layer_types=[SLIDING] * 4),
            dict(layer_types=[FULL] + [SLIDING] * 3),
            dict(rope_scaling=None),
        ),
    ),
    "smollm3": Case(
        SmolLM3ForCausalLM,
        dict(
            NARROW,
            num_hidden_layers=4,
            no_rope_layer_interval=4,
            tie_word_embeddings=True,
        ),
        matters=(dict(no_rope_layers=[1] * 4), dict(no_rope_layers=[0, 1, 1, 1])),
    ),
    "stablelm": Case(
        StableLmForCausalLM,
        dict(BASE, **STABLE, intermediate_size=32, use_qkv_bias=True),
        matters=(dict(use_qkv_bias=False), dict(partial_rotary_factor=0.5)),
    ),
    "stablelm-parallel": Case(
        StableLmForCausalLM,
        dict(NARROW, **STABLE, use_parallel_residual=True),
        matters=(dict(use_parallel_residual=False),),
    ),
    "exaone4": Case(
        Exaone4ForCausalLM,
        dict(
            NARROW,
            head_dim=16,
            # The fourth layer sees all and knows no positions.
            num_hidden_layers=4,
            sliding_window=8,
            sliding_window_pattern=4,
        ),
        tokens=48,
        matters=(
            dict(sliding_window=9),
            dict(layer_types=[SLIDING] * 4),
            dict(layer_types=[FULL] + [SLIDING] * 3),
        ),
    ),
    "seed-oss": Case(
        SeedOssForCausalLM,
        dict(SMALL, head_dim=32, attention_bias=True),
        matters=(dict(attention_bias=False),),
    ),
    "ministral": Case(
        MinistralForCausalLM,
        dict(
            SMALL,
            head_dim=16,
            num_hidden_layers=3,
            sliding_window=8,
            layer_types=[SLIDING, FULL, SLIDING],
        ),
        tokens=48,
        matters=(dict(sliding_window=9), dict(layer_types=[FULL] * 3)),
    ),
}
