"""Families without a class in transformers: an equivalent one computes; the tensors are renamed and
packed, and the configuration written, as in the published files. plain.py reads them back.
"""

import torch
from torch.nn import functional as F
from transformers import (
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    StableLmForCausalLM,
)

from . import plain
from .common import BASE, NARROW, SMALL, Case

# What the configurations of these families have in common, from the oracle's.
COMMON = (
    "bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size"
    " max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads"
    " pad_token_id rms_norm_eps rope_theta tie_word_embeddings use_cache vocab_size"
).split()


def published(arch, config, **more):
    """A configuration with remote code, in the spelling of the transformers of its time."""
    name = arch.removesuffix("ForCausalLM")
    kind = more.get("model_type", name.lower())
    out = {key: config[key] for key in COMMON if key in config}
    out |= dict(
        architectures=[arch],
        auto_map={
            "AutoConfig": f"configuration_{kind}.{name}Config",
            "AutoModelForCausalLM": f"modeling_{kind}.{arch}",
        },
        model_type=kind,
        torch_dtype="bfloat16",
        transformers_version="4.36.0",
    )
    return out | more


def rename(state, *pairs):
    out = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def swiglu(config, state):
    for name in [n for n in state if n.endswith("mlp.gate_proj.weight")]:
        mlp = name.removesuffix("gate_proj.weight")
        fused = torch.cat([state.pop(name), state.pop(f"{mlp}up_proj.weight")])
        state[f"{mlp}swiglu.w12.weight"] = fused
        state[f"{mlp}swiglu.w3.weight"] = state.pop(f"{mlp}down_proj.weight")
    return config, state


def yi(config, state):
    state = rename(state, ("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))
    return published("YiForCausalLM", config, model_type="Yi"), state


def internlm2(config, state):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    d = config["hidden_size"] // heads
    for name in [n for n in state if n.endswith("self_attn.q_proj.weight")]:
        attn = name.removesuffix("q_proj.weight")
        q, k, v = (
            state.pop(f"{attn}{x}_proj.weight").view(groups, -1, d, heads * d) for x in "qkv"
        )
        state[f"{attn}wqkv.weight"] = torch.cat([q, k, v], 1).reshape(-1, heads * d)
    state = rename(
        state,
        ("self_attn.", "attention."),
        ("o_proj", "wo"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )
    scaling = config["rope_scaling"]
    config = published(
        "InternLM2ForCausalLM",
        config,
        attn_implementation="eager",
        bias=False,
        pretraining_tp=1,
        rope_scaling=scaling and dict(type=scaling["rope_type"], factor=scaling["factor"]),
        rope_theta=int(config["rope_theta"]),
    )
    return config, state


def index(config, state):
    return published("IndexForCausalLM", config, norm_head=1, rope_scaling=None), state


def index_logits(model, ids):
    """The rows of the head have length one."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[0]
    return hidden @ F.normalize(model.lm_head.weight).T


def orion(config, state):
    more = dict(
        max_sequence_length=config["max_position_embeddings"],
        pretraining_tp=1,
        rms_norm_eps=config["layer_norm_eps"],
        rope_scaling=None,
    )
    return published("OrionForCausalLM", config, **more), state


# Of MiniCPM: scale_emb, scale_depth, dim_model_base.
SCALES = dict(scale_emb=12, scale_depth=1.4, dim_model_base=16)


def minicpm(config, state):
    # Tied, which the code's default says and the published configuration does not.
    return published("MiniCPMForCausalLM", config, rope_scaling=None, **SCALES), state


def qwen(config, state):
    for name in [n for n in state if ".q_proj." in n]:
        parts = [state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        state[name.replace(".q_proj.", ".c_attn.")] = torch.cat(parts)
    state = rename(
        state,
        ("model.layers.", "transformer.h."),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("self_attn.", "attn."),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.down_proj", "mlp.c_proj"),
    )
    kept = "hidden_size initializer_range num_attention_heads num_hidden_layers vocab_size".split()
    return dict(
        {key: config[key] for key in kept},
        architectures=["QWenLMHeadModel"],
        attn_dropout_prob=0.0,
        auto_map={
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        bf16=True,
        emb_dropout_prob=0.0,
        fp16=False,
        fp32=False,
        intermediate_size=2 * config["intermediate_size"],
        kv_channels=config["hidden_size"] // config["num_attention_heads"],
        layer_norm_epsilon=config["rms_norm_eps"],
        max_position_embeddings=config["max_position_embeddings"],
        model_type="qwen",
        no_bias=True,
        onnx_safe=None,
        rotary_emb_base=int(config["rope_theta"]),
        rotary_pct=1.0,
        scale_attn_weights=True,
        seq_length=config["max_position_embeddings"] // 2,
        tie_word_embeddings=False,
        tokenizer_class="QWenTokenizer",
        transformers_version="4.32.0",
        use_cache=True,
        use_dynamic_ntk=True,
        use_flash_attn="auto",
        use_logn_attn=True,
    ), state


# As many key heads as query heads.
MHA = dict(NARROW, num_key_value_heads=2)
DYNAMIC = dict(rope_type="dynamic", factor=2.0)

CASES = {
    "llama-swiglu": Case(
        LlamaForCausalLM,
        dict(SMALL, head_dim=16),
        publish=swiglu,
        check=plain.read_by(plain.Swiglu),
    ),
    "yi": Case(
        LlamaForCausalLM,
        dict(NARROW, rms_norm_eps=1e-5, rope_theta=5e6),
        publish=yi,
        check=plain.read_by(plain.Yi),
        matters=(dict(rope_theta=1e4),),
    ),
    "internlm2": Case(
        LlamaForCausalLM,
        dict(BASE, rms_norm_eps=1e-5, rope_theta=1e6),
        publish=internlm2,
        check=plain.read_by(plain.InternLm2),
        matters=(dict(rope_theta=1e4),),
    ),
    "internlm2-dynamic": Case(
        LlamaForCausalLM,
        dict(NARROW, rope_scaling=DYNAMIC),
        publish=internlm2,
        check=plain.read_by(plain.InternLm2),
    ),
    "index": Case(
        LlamaForCausalLM,
        MHA,
        logits=index_logits,
        publish=index,
        check=plain.read_by(plain.Index),
    ),
    "orion": Case(
        StableLmForCausalLM,
        dict(MHA, partial_rotary_factor=1.0, layer_norm_eps=1e-5),
        publish=orion,
        check=plain.read_by(plain.Orion),
    ),
    "minicpm": Case(
        GraniteForCausalLM,
        dict(
            MHA,
            embedding_multiplier=SCALES["scale_emb"],
            residual_multiplier=SCALES["scale_depth"] / MHA["num_hidden_layers"] ** 0.5,
            logits_scaling=MHA["hidden_size"] / SCALES["dim_model_base"],
            attention_multiplier=0.25,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        publish=minicpm,
        check=plain.read_by(plain.MiniCpm),
        embedding_std=0.025,
        matters=(
            dict(embedding_multiplier=1.0),
            dict(residual_multiplier=1.0),
            dict(logits_scaling=1.0),
        ),
    ),
    "qwen1": Case(
        Qwen2ForCausalLM,
        MHA,
        publish=qwen,
        check=plain.read_by(plain.Qwen),
    ),
}
