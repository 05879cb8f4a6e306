#!/usr/bin/env python3
"""Makes the golden fixtures of exl-models with Hugging Face transformers.

    python3 -m venv venv && venv/bin/pip install torch transformers==4.57.1 numpy safetensors
    venv/bin/python exl-models/tests/golden/make.py [CASE...]
    venv/bin/python exl-models/tests/golden/make.py --greedy MODEL_DIR OUT.json

Writes beside itself, per case, NAME-tiny/{config.json, model.safetensors, golden.safetensors} and
rope.json (the case `rope`); all of them unless cases are named. The weights are random (seeded);
they are rounded to the stored type first and computed with in fp32, eager attention. README.md says
what the files hold. The cases of Llama, Mistral, Qwen2 and Qwen3 are here, all others in families/.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# No caches beside the sources.
sys.dont_write_bytecode = True

import families
from families.common import make as make_family

HERE = Path(__file__).resolve().parent
# An odd vocabulary: widths that no vector register divides.
BASE = dict(
    vocab_size=250,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

LLAMA = (LlamaConfig, LlamaForCausalLM)
MISTRAL = (MistralConfig, MistralForCausalLM)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)

# name: (classes, settings, stored type, tokens)
CASES = {
    "llama-plain": (LLAMA, {}, torch.bfloat16, 40),
    "llama-llama3": (LLAMA, dict(rope_theta=500000.0, rope_scaling=LLAMA3), torch.bfloat16, 40),
    "llama-linear": (
        LLAMA,
        dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
        torch.bfloat16,
        40,
    ),
    "llama-yarn": (LLAMA, dict(rope_scaling=YARN), torch.bfloat16, 100),
    "llama-bias": (LLAMA, dict(attention_bias=True, mlp_bias=True), torch.bfloat16, 40),
    "llama-tied": (
        LLAMA,
        dict(
            tie_word_embeddings=True,
            hidden_size=48,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=64,
        ),
        torch.float32,
        40,
    ),
    "llama-headdim": (LLAMA, dict(head_dim=32, intermediate_size=64), torch.bfloat16, 40),
    "llama-v5": (LLAMA, dict(rope_theta=500000.0, rope_scaling=LLAMA3), torch.bfloat16, 40),
    "mistral-window": (MISTRAL, dict(sliding_window=8), torch.float16, 40),
    "mistral-full": (
        MISTRAL,
        dict(sliding_window=None, head_dim=32, intermediate_size=64),
        torch.bfloat16,
        40,
    ),
    "qwen2": (QWEN2, {}, torch.bfloat16, 40),
    "qwen2-tied": (QWEN2, dict(tie_word_embeddings=True), torch.bfloat16, 40),
    "qwen2-window": (
        QWEN2,
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        torch.bfloat16,
        40,
    ),
    "qwen3": (QWEN3, dict(head_dim=32, intermediate_size=64), torch.bfloat16, 40),
}


def randomize(model, dtype):
    """Weights N(0, 0.2), norms N(1, 0.2); the default 0.02 hides errors."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            p.copy_((torch.randn(p.shape) * 0.2 + mean).to(dtype).float())


def config_v5(config):
    """The spelling of transformers 5: theta inside rope_parameters, dtype."""
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = dict(scaling, rope_theta=config.pop("rope_theta"))
    config["dtype"] = config.pop("torch_dtype")
    config["transformers_version"] = "5.0.0"
    return config


def make(name, classes, settings, dtype, tokens):
    torch.manual_seed(sum(name.encode()))
    settings = {**BASE, **settings}
    config = classes[0](**settings)
    model = classes[1](config).float().eval()
    randomize(model, dtype)
    ids = torch.randint(2, settings["vocab_size"], (1, tokens))
    with torch.no_grad():
        logits = model(ids).logits[0]
    step = 1 if tokens <= 40 else 4
    positions = torch.arange(step - 1, tokens, step)
    out = HERE / f"{name}-tiny"
    out.mkdir(exist_ok=True)
    text = json.loads(config.to_json_string(use_diff=False))
    keep = set(settings) | {"architectures", "model_type", "rms_norm_eps", "rope_theta", "head_dim"}
    keep |= {"hidden_act", "rope_scaling", "layer_types"}
    text = {k: v for k, v in text.items() if k in keep}
    text["architectures"] = [classes[1].__name__]
    text["torch_dtype"] = str(dtype).removeprefix("torch.")
    if name.endswith("-v5"):
        text = config_v5(text)
    (out / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    golden = {
        "input_ids": ids[0].int(),
        "positions": positions.int(),
        "logits": logits[positions].contiguous(),
    }
    save_file(golden, out / "golden.safetensors")
    size = sum(f.stat().st_size for f in out.iterdir())
    assert size < 300_000, f"{name}: {size} bytes"
    print(f"{name}: {size} bytes, logits {logits.min():.2f} to {logits.max():.2f}")


def rope_cases():
    """Inverse frequencies of every kind of scaling, for unit tests."""
    pairs = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
    longrope = dict(rope_type="longrope", short_factor=pairs[0], long_factor=pairs[1])
    phi3 = dict(max_position_embeddings=256, original_max_position_embeddings=64)
    dynamic = dict(rope_type="dynamic", factor=2.0)
    cases = [
        (dict(), None),
        (dict(rope_theta=1e6), None),
        (dict(partial_rotary_factor=0.5), None),
        (dict(head_dim=128, rope_theta=5e5), None),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.5)), None),
        (dict(rope_scaling=dynamic), 100),
        (dict(rope_scaling=dynamic), 1000),
        (dict(rope_scaling=LLAMA3), None),
        (dict(head_dim=128, rope_theta=5e5, rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192, factor=32.0)), None),
        (dict(rope_scaling=YARN), None),
        (dict(head_dim=128, rope_scaling=dict(YARN, original_max_position_embeddings=4096, factor=8.0)), None),
        (dict(rope_scaling=dict(YARN, beta_fast=16.0, beta_slow=2.0, truncate=False)), None),
        (dict(rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=0.7)), None),
        (dict(rope_scaling=dict(YARN, attention_factor=1.25)), None),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), None),
        (dict(rope_scaling=longrope, **phi3), 32),
        (dict(rope_scaling=longrope, **phi3), 200),
        (dict(rope_scaling=dict(longrope, factor=4.0), **{"max_position_embeddings": 128}), 200),
        (dict(rope_scaling=dict(longrope, attention_factor=1.5), **phi3), 200),
    ]
    out = []
    for settings, length in cases:
        settings = {**dict(head_dim=16, rope_theta=10000.0, max_position_embeddings=256), **settings}
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, **settings)
        kind = (settings.get("rope_scaling") or {}).get("rope_type", "default")
        freqs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        out.append(
            dict(config=settings, context=length, inv_freq=freqs.tolist(), attention_factor=factor)
        )
    (HERE / "rope.json").write_text(json.dumps(out, indent=1) + "\n")


def greedy(model_dir, out, prompt="CHAPTER I.\n\n", count=200):
    """Greedy continuation in fp32, past the end token, with the gap to the runner-up."""
    from tokenizers import Tokenizer

    model = LlamaForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt_ids = Tokenizer.from_file(f"{model_dir}/tokenizer.json").encode(prompt).ids
    ids, gaps = list(prompt_ids), []
    with torch.no_grad():
        for _ in range(count):
            top = model(torch.tensor([ids])).logits[0, -1].topk(2)
            ids.append(int(top.indices[0]))
            gaps.append(round(float(top.values[0] - top.values[1]), 6))
    fixture = dict(text=prompt, prompt=prompt_ids, ids=ids[len(prompt_ids) :], gaps=gaps)
    Path(out).write_text(json.dumps(fixture) + "\n")
    print(f"{out}: smallest gap {min(gaps)}")


def main(wanted):
    unknown = set(wanted) - CASES.keys() - families.CASES.keys() - {"rope"}
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    for name, case in CASES.items():
        if not wanted or name in wanted:
            make(name, *case)
    for name, case in families.CASES.items():
        if not wanted or name in wanted:
            make_family(name, case, HERE)
    if not wanted or "rope" in wanted:
        rope_cases()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--greedy"]:
        greedy(sys.argv[2], sys.argv[3])
    else:
        main(sys.argv[1:])
