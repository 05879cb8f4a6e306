"""GPT-2, StarCoder 1 and 2: layer norms with biases, plain MLPs, biases everywhere."""

import torch
from transformers import GPT2LMHeadModel, GPTBigCodeForCausalLM, Starcoder2ForCausalLM

from .common import BASE, IDS, Case

GPT = dict(IDS, n_embd=64, n_head=4, n_layer=2, n_inner=32, n_positions=64)


def as_on_the_hub(config, state):
    """The first release: no prefix, masks among the tensors, few keys in the configuration."""
    size = config["n_positions"]
    mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    for i in range(config["n_layer"]):
        state[f"h.{i}.attn.bias"] = mask.clone()
    keys = (
        "activation_function architectures attn_pdrop bos_token_id embd_pdrop eos_token_id"
        " initializer_range layer_norm_epsilon model_type n_embd n_head n_layer n_positions"
        " resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels"
        " summary_type summary_use_proj vocab_size"
    )
    return {key: config[key] for key in keys.split()} | {"n_ctx": size}, state


CASES = {
    "gpt2": Case(GPT2LMHeadModel, GPT, matters=(dict(activation_function="relu"),)),
    "gpt2-hub": Case(
        GPT2LMHeadModel,
        # Four times as wide inside, which is what no width means.
        dict(GPT, n_embd=32, n_head=2, n_inner=None),
        publish=as_on_the_hub,
    ),
    "gpt-bigcode": Case(
        GPTBigCodeForCausalLM,
        dict(GPT, multi_query=True),
        matters=(dict(scale_attn_weights=False),),
    ),
    "starcoder2": Case(
        Starcoder2ForCausalLM,
        dict(
            BASE,
            use_bias=True,
            sliding_window=8,
            norm_epsilon=1e-5,
            rope_theta=1e5,
            tie_word_embeddings=True,
        ),
        tokens=48,
        matters=(dict(sliding_window=9), dict(sliding_window=None), dict(rope_theta=1e4)),
    ),
}
