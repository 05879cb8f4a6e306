"""Phi-3 and Phi-4: fused matrices, longrope, partial rotation, a window."""

from transformers import Phi3ForCausalLM

from .common import BASE, NARROW, Case

# 16 wide heads of which 12 elements turn.
LONGROPE = dict(
    NARROW,
    partial_rotary_factor=0.75,
    rope_scaling=dict(
        type="longrope",
        short_factor=[1.0, 1.05, 1.1, 1.2, 1.35, 1.5],
        long_factor=[1.5, 2.0, 3.0, 5.0, 9.0, 16.0],
    ),
)
OTHER = dict(LONGROPE["rope_scaling"])
OTHER["short_factor"], OTHER["long_factor"] = OTHER["long_factor"], OTHER["short_factor"]

CASES = {
    "phi3": Case(Phi3ForCausalLM, BASE),
    "phi3-window": Case(
        Phi3ForCausalLM,
        dict(NARROW, sliding_window=8, tie_word_embeddings=True),
        matters=(dict(sliding_window=9), dict(sliding_window=None)),
    ),
    # No sequence is longer than the original context, so that the short factors hold.
    "phi3-longrope-short": Case(
        Phi3ForCausalLM,
        dict(LONGROPE, original_max_position_embeddings=64),
        matters=(
            dict(rope_scaling=OTHER),
            dict(rope_scaling=None),
            dict(max_position_embeddings=64),
            dict(partial_rotary_factor=1.0, rope_scaling=None),
        ),
    ),
    # Every sequence is longer, the prompt of the greedy continuation as well.
    "phi3-longrope-long": Case(
        Phi3ForCausalLM,
        dict(LONGROPE, original_max_position_embeddings=8),
        tokens=48,
        matters=(
            dict(rope_scaling=OTHER),
            dict(rope_scaling=None),
            dict(max_position_embeddings=64),
        ),
    ),
}
