//! Damaged and mismatched directories: one clear line each.

use exl_models::{LoadOptions, Model, ModelSource};
use serde_json::json;

use crate::common::{Parts, dir};

fn error(parts: &Parts, name: &str) -> String {
    let found = Model::open(&parts.write(name), &LoadOptions::default());
    found.err().map(|e| e.to_string()).expect("a refusal")
}

#[test]
fn unknown_architecture() {
    let mut parts = Parts::of("llama-plain");
    parts.config["architectures"] = json!(["LamaForCausalLM"]);
    let text = error(&parts, "architecture");
    assert!(
        text.contains("config.json: unknown architecture \"LamaForCausalLM\""),
        "{text}"
    );
    assert!(
        text.contains("nearest known one is \"LlamaForCausalLM\""),
        "{text}"
    );
    let options = LoadOptions {
        assume_llama: true,
        ..Default::default()
    };
    Model::open(&parts.write("architecture"), &options).unwrap();
}

#[test]
fn missing_tensors() {
    let mut parts = Parts::of("qwen2");
    parts
        .tensors
        .remove("model.layers.1.self_attn.k_proj.weight");
    parts.tensors.remove("model.layers.1.self_attn.v_proj.bias");
    parts.tensors.remove("model.norm.weight");
    let text = error(&parts, "missing");
    assert!(
        text.ends_with(
            ": no tensor model.layers.1.self_attn.k_proj (looked for .q_weight, .qweight, \
             .weight), nor 2 others"
        ),
        "{text}"
    );
}

#[test]
fn layers_the_configuration_leaves_out() {
    let mut parts = Parts::of("llama-plain");
    parts.config["num_hidden_layers"] = json!(1);
    let text = error(&parts, "layers");
    assert!(
        text.ends_with(
            "tensor model.layers.1.input_layernorm.weight: expected 1 layers (num_hidden_layers \
             in config.json), found one more"
        ),
        "{text}"
    );
}

#[test]
fn a_head_may_be_missing_only_when_tied() {
    let mut parts = Parts::of("qwen2");
    parts.tensors.remove("lm_head.weight");
    assert!(error(&parts, "head").contains("no tensor lm_head"));
    parts.config["tie_word_embeddings"] = json!(true);
    let model = Model::open(&parts.write("head"), &LoadOptions::default()).unwrap();
    let at = |name| model.weights().get(name).unwrap();
    assert!(std::sync::Arc::ptr_eq(
        at("lm_head"),
        at("model.embed_tokens")
    ));
}

#[test]
fn wrong_shape_and_type() {
    let mut parts = Parts::of("llama-plain");
    parts.config["intermediate_size"] = json!(64);
    let text = error(&parts, "shape");
    assert!(
        text.ends_with(
            "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight: expected shape \
             [64, 64], found shape [96, 64]"
        ),
        "{text}"
    );
    let mut parts = Parts::of("llama-plain");
    parts.tensor("model.norm.weight").0 = "I16".to_owned();
    let text = error(&parts, "type");
    assert!(
        text.contains("tensor model.norm.weight: expected F32, F16 or BF16"),
        "{text}"
    );
}

#[test]
fn half_quantized_blocks() {
    let mut parts = Parts::of("llama-plain");
    let name = "model.layers.1.mlp.up_proj";
    let weight = parts.tensors.remove(&format!("{name}.weight")).unwrap();
    parts.tensors.insert(format!("{name}.q_weight"), weight);
    assert_eq!(
        error(&parts, "partial"),
        "model.layers.1.mlp is partially quantized: gate_proj unquantized, up_proj EXL2, \
         down_proj unquantized; all of its linears must be stored alike"
    );
}

#[test]
fn biases_the_configuration_does_not_announce() {
    let mut parts = Parts::of("llama-bias");
    parts.config["mlp_bias"] = json!(false);
    let text = error(&parts, "bias");
    assert!(
        text.contains("tensor model.layers.0.mlp.gate_proj.bias: expected no bias"),
        "{text}"
    );
    for (name, (_, _, bytes)) in &mut parts.tensors {
        if name.contains(".mlp.") && name.ends_with(".bias") {
            bytes.fill(0);
        }
    }
    Model::open(&parts.write("bias"), &LoadOptions::default()).unwrap();
}

#[test]
fn not_a_number() {
    let mut parts = Parts::of("llama-plain");
    let weight = &mut parts.tensor("model.layers.0.mlp.down_proj.weight").2;
    weight[2 * 77..][..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    let text = error(&parts, "nan");
    assert!(
        text.ends_with(
            "tensor model.layers.0.mlp.down_proj.weight: value 77 is NaN; the checkpoint is damaged"
        ),
        "{text}"
    );
    let source = ModelSource::open(&parts.write("nan"), &LoadOptions::default()).unwrap();
    let check = |name: &str| source.check_finite(source.key(name).unwrap());
    check("model.embed_tokens").unwrap();
    check("model.layers.0.mlp.down_proj").unwrap_err();
}

/// EXL2 files store one row per head.
#[test]
fn head_norms_in_two_dimensions() {
    let mut parts = Parts::of("qwen3");
    let plain = Model::open(&dir("qwen3"), &LoadOptions::default()).unwrap();
    for (name, (_, shape, bytes)) in &mut parts.tensors {
        let heads = match name {
            n if n.ends_with("q_norm.weight") => 4,
            n if n.ends_with("k_norm.weight") => 2,
            _ => continue,
        };
        *shape = vec![heads, 32];
        *bytes = bytes.repeat(heads);
    }
    let model = Model::open(&parts.write("head-norm"), &LoadOptions::default()).unwrap();
    for name in ["q_norm", "k_norm"].map(|n| format!("model.layers.1.self_attn.{n}")) {
        let values = |m: &Model| m.weights().get(&name).unwrap().to_f32(&name).unwrap();
        assert_eq!(values(&model), values(&plain));
    }
    parts.tensor("model.layers.0.self_attn.q_norm.weight").2[0] ^= 1;
    let text = error(&parts, "head-norm");
    assert!(text.ends_with("expected the same row for every head, found rows that differ"));
}
