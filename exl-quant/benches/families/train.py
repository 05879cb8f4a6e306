"""Trains the tiny models of docs/quantizer.md's table of untuned families.

    python train.py FAMILY OUT --corpus train.txt.xz --tokenizer DIR [--steps N] [--stop N]

FAMILY is one of FAMILIES below. OUT gets a model directory (bf16 safetensors, config.json, the
tokenizer), written anew every `--save-every` steps and at the end. The learning rate follows
`--steps`; `--stop` ends before that.
"""

import argparse
import lzma
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

ROW = 512
BATCH = 4
PEAK_RATE = 2e-3
WARM_UP = 100

COMMON = dict(vocab_size=2048, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
              rope_theta=10000.0)

# Widths are multiples of 32, and none that a linear reads is a multiple of 128 but 256.
FAMILIES = {
    "qwen3": (1307, Qwen3Config(
        hidden_size=192, intermediate_size=544, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False, **COMMON)),
    "qwen2": (2411, Qwen2Config(
        hidden_size=224, intermediate_size=608, num_hidden_layers=4, num_attention_heads=7,
        num_key_value_heads=1, tie_word_embeddings=True, **COMMON)),
}


def read_tokens(corpus, tokenizer, megabytes):
    """The first megabytes of the corpus as token ids; its documents are shuffled."""
    with lzma.open(corpus, "rt", encoding="utf-8") as text:
        texts = text.read(megabytes * 1_000_000).split("\n\n")
    encoded = tokenizer.encode_batch([t for t in texts if t], add_special_tokens=False)
    return np.concatenate([np.array(e.ids, dtype=np.int16) for e in encoded])


def learning_rate(step, steps):
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))


def batch(tokens, rng):
    starts = rng.integers(0, len(tokens) - ROW, BATCH)
    rows = np.stack([tokens[s : s + ROW] for s in starts]).astype(np.int64)
    return torch.from_numpy(rows)


def save(model, config, tokenizer_dir, out):
    """Writes the model beside `out` and renames it, so that `out` is always complete."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    half = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(aside)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, aside / name)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(aside, out)


def train(model, tokens, rng, args, keep):
    # Vectors (norms, biases) are not decayed.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.95))
    mean, begun = None, time.time()
    for step in range(min(args.steps, args.stop or args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        rows = batch(tokens, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} loss {mean:.3f} {time.time() - begun:.0f} s", flush=True)
        if (step + 1) % args.save_every == 0:
            keep(model)
    keep(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()

    torch.set_num_threads(1)
    seed, config = FAMILIES[args.family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, torch_dtype=torch.float32, attn_implementation="eager")
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    tokens = read_tokens(args.corpus, tokenizer, args.megabytes)
    print(f"{len(tokens)} tokens", flush=True)
    train(model, tokens, np.random.default_rng(seed), args,
          lambda m: save(m, config, args.tokenizer, args.out))


if __name__ == "__main__":
    main()
