"""Command-R: parallel blocks, interleaved rotation, scaled logits; layers without positions."""

from transformers import Cohere2ForCausalLM, CohereForCausalLM

from .common import BASE, NARROW, Case

COHERE = dict(
    BASE, intermediate_size=32, logit_scale=0.5, tie_word_embeddings=True, layer_norm_eps=1e-5
)

CASES = {
    "cohere": Case(CohereForCausalLM, COHERE, matters=(dict(logit_scale=0.0625),)),
    "cohere-qknorm": Case(
        CohereForCausalLM,
        dict(COHERE, use_qk_norm=True),
        matters=(dict(use_qk_norm=False),),
    ),
    "cohere2": Case(
        Cohere2ForCausalLM,
        dict(
            NARROW,
            intermediate_size=32,
            # Three of four layers slide and rotate; the fourth sees all and knows no positions.
            num_hidden_layers=8,
            sliding_window=8,
            logit_scale=0.5,
            tie_word_embeddings=True,
        ),
        tokens=48,
        matters=(
            dict(sliding_window=9),
            dict(layer_types=["sliding_attention"] * 8),
            dict(layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 2),
        ),
    ),
}
