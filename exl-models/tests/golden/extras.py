#!/usr/bin/env python3
"""Makes the golden fixtures of adapters, vectors in place of tokens and hidden states with PEFT and
transformers, beside the models that make.py writes.

    python3 -m venv venv && venv/bin/pip install torch transformers==4.57.1 peft==0.21.2 safetensors
    venv/bin/python exl-models/tests/golden/extras.py

Writes extras/plain and extras/patterns, two adapters of llama-plain-tiny as PEFT saves them, and
extras/golden.safetensors: input_ids I32 [T]; logits F32 [T, V] with each adapter (plain, patterns)
and with both, plain at half its strength (both); vectors F32 [3, H] that stand at positions 5 to 7,
and the logits with them (with_vectors); the last hidden states F32 [T, H] (hidden).
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
MODEL = HERE / "llama-plain-tiny"
OUT = HERE / "extras"
TOKENS = 24
ADAPTERS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="none"),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=12,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"down_proj": 3, r"layers\.1\.self_attn\.[kv]_proj": 5},
        alpha_pattern={"o_proj": 7, "model.layers.0.mlp.up_proj": 20},
        bias="none",
    ),
}


def base():
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    ids = load_file(MODEL / "golden.safetensors")["input_ids"][:TOKENS].long()[None]
    golden = {"input_ids": ids[0].int()}
    model = base()
    with torch.no_grad():
        golden["hidden"] = model.model(ids).last_hidden_state[0].clone()
        vectors = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        embeds = model.get_input_embeddings()(ids).clone()
        vectors *= embeds.std()
        embeds[0, 5:8] = vectors
        golden["vectors"] = vectors.clone()
        golden["with_vectors"] = model(inputs_embeds=embeds).logits[0].clone()
    names = list(ADAPTERS)
    model = get_peft_model(model, ADAPTERS[names[0]], adapter_name=names[0])
    model.add_adapter(names[1], ADAPTERS[names[1]])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                dtype = torch.bfloat16 if ".plain." in name else torch.float32
                # Large enough to show: the logits change by about a third of their range.
                p.copy_((torch.randn(p.shape, generator=generator) * 0.15).to(dtype))
    model.eval()
    for name in names:
        model.set_adapter(name)
        with torch.no_grad():
            golden[name] = model(ids).logits[0].clone()
        model.save_pretrained(OUT / name, selected_adapters=[name])
        # PEFT puts adapters that are not called "default" into a folder of their name.
        inner = OUT / name / name
        for file in inner.iterdir():
            file.rename(OUT / name / file.name)
        inner.rmdir()
        (OUT / name / "README.md").unlink(missing_ok=True)
        config = json.loads((OUT / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = MODEL.name
        config.pop("peft_version", None)
        # A set, in no order.
        config["target_modules"].sort()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (OUT / name / "adapter_config.json").write_text(text)
    # As bf16, which is what the values were rounded to.
    path = OUT / "plain" / "adapter_model.safetensors"
    state = {k: v.bfloat16() for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    model.base_model.set_adapter(names)
    for module in model.modules():
        if hasattr(module, "set_scale") and "plain" in getattr(module, "scaling", {}):
            module.set_scale("plain", 0.5)
    with torch.no_grad():
        golden["both"] = model(ids).logits[0].clone()
    save_file(golden, OUT / "golden.safetensors")


if __name__ == "__main__":
    main()
