"""Gemma, Gemma 2 and the text models of Gemma 3."""

from transformers import Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM

from .common import NARROW, SMALL, Case

FULL = "full_attention"

CASES = {
    "gemma": Case(
        GemmaForCausalLM,
        dict(
            SMALL,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
        ),
        matters=(dict(hidden_act="silu"), dict(rope_theta=1e6)),
    ),
    "gemma2": Case(
        Gemma2ForCausalLM,
        dict(
            SMALL,
            head_dim=16,
            num_hidden_layers=4,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=5.0,
            query_pre_attn_scalar=24,
            tie_word_embeddings=True,
        ),
        tokens=48,
        matters=(
            dict(sliding_window=9),
            dict(layer_types=[FULL] * 4),
            dict(attn_logit_softcapping=50.0),
            dict(final_logit_softcapping=50.0),
            dict(query_pre_attn_scalar=16),
        ),
    ),
    "gemma3-text": Case(
        Gemma3ForCausalLM,
        dict(
            NARROW,
            head_dim=16,
            intermediate_size=32,
            # Five that slide, a global one, one that slides.
            num_hidden_layers=7,
            sliding_window=8,
            query_pre_attn_scalar=24,
            rope_theta=1e6,
            rope_local_base_freq=10000.0,
            rope_scaling=dict(rope_type="linear", factor=8.0),
            tie_word_embeddings=True,
        ),
        tokens=48,
        matters=(
            dict(sliding_window=9),
            dict(layer_types=[FULL] * 7),
            dict(rope_local_base_freq=1e6),
            dict(rope_theta=10000.0),
            dict(rope_scaling=None),
            dict(query_pre_attn_scalar=16),
        ),
    ),
}
