//! Damaged and mismatched directories: one clear line each.

use std::collections::BTreeMap;
use std::path::PathBuf;

use exl_models::{LoadOptions, Model, ModelSource, check_finite};
use serde_json::{Value, json};

use crate::common::dir;

/// A safetensors file taken apart.
struct Parts {
    config: Value,
    /// Type, shape, bytes.
    tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn of(case: &str) -> Self {
        let text = std::fs::read_to_string(dir(case).join("config.json")).unwrap();
        let file = std::fs::read(dir(case).join("model.safetensors")).unwrap();
        let split = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..split]).unwrap();
        let number = |v: &Value| v.as_u64().unwrap() as usize;
        let mut tensors = BTreeMap::new();
        for (name, t) in header.as_object().unwrap() {
            if name == "__metadata__" {
                continue;
            }
            let shape = t["shape"].as_array().unwrap().iter().map(number).collect();
            let range = number(&t["data_offsets"][0])..number(&t["data_offsets"][1]);
            let dtype = t["dtype"].as_str().unwrap().to_owned();
            tensors.insert(name.clone(), (dtype, shape, file[split..][range].to_vec()));
        }
        Self {
            config: serde_json::from_str(&text).unwrap(),
            tensors,
        }
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<usize>, Vec<u8>) {
        self.tensors.get_mut(name).unwrap()
    }

    fn write(&self, name: &str) -> PathBuf {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("bad-input-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
            data.extend_from_slice(bytes);
        }
        let mut header = Value::Object(header).to_string();
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&data);
        std::fs::write(dir.join("model.safetensors"), file).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        dir
    }

    fn error(&self, name: &str) -> String {
        let found = Model::open(&self.write(name), &LoadOptions::default());
        found.err().map(|e| e.to_string()).expect("a refusal")
    }
}

#[test]
fn unknown_architecture() {
    let mut parts = Parts::of("llama-plain");
    parts.config["architectures"] = json!(["LamaForCausalLM"]);
    let text = parts.error("architecture");
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
    let text = parts.error("missing");
    assert!(
        text.ends_with(
            ": no tensor model.layers.1.self_attn.k_proj (looked for .q_weight, .qweight, \
             .weight), nor 2 others"
        ),
        "{text}"
    );
}

#[test]
fn a_head_may_be_missing_only_when_tied() {
    let mut parts = Parts::of("qwen2");
    parts.tensors.remove("lm_head.weight");
    assert!(parts.error("head").contains("no tensor lm_head"));
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
    let text = parts.error("shape");
    assert!(
        text.ends_with(
            "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight: expected shape \
             [64, 64], found shape [96, 64]"
        ),
        "{text}"
    );
    let mut parts = Parts::of("llama-plain");
    parts.tensor("model.norm.weight").0 = "I16".to_owned();
    let text = parts.error("type");
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
        parts.error("partial"),
        "model.layers.1.mlp is partially quantized: gate_proj unquantized, up_proj EXL2, \
         down_proj unquantized; all of its linears must be stored alike"
    );
}

#[test]
fn biases_the_configuration_does_not_announce() {
    let mut parts = Parts::of("llama-bias");
    parts.config["mlp_bias"] = json!(false);
    let text = parts.error("bias");
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
    let text = parts.error("nan");
    assert!(
        text.ends_with(
            "tensor model.layers.0.mlp.down_proj.weight: value 77 is NaN; the checkpoint is damaged"
        ),
        "{text}"
    );
    let source = ModelSource::open(&parts.write("nan"), &LoadOptions::default()).unwrap();
    let view = |name: &str| source.files().tensor(name).unwrap();
    check_finite(&view("model.embed_tokens.weight")).unwrap();
    check_finite(&view("model.layers.0.mlp.down_proj.weight")).unwrap_err();
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
    let text = parts.error("head-norm");
    assert!(text.ends_with("expected the same row for every head, found rows that differ"));
}
