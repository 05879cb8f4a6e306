//! Sizes of known models.

use crate::failure::Usage;
use anyhow::{Result, bail};
use serde_json::{Value, json};

/// The sizes that decide how fast a dense Llama-like model runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    /// Longest context in tokens; at least 8192, because speed at long contexts is measured too.
    pub(crate) positions: usize,
    pub(crate) rope_theta: f64,
}

const SHAPES: [Shape; 5] = [
    // Made and measured in a second: to try the command, and to test it.
    Shape {
        name: "smoke-2m",
        hidden: 256,
        intermediate: 704,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 2048,
        positions: 8192,
        rope_theta: 1e4,
    },
    Shape {
        name: "tinyllama-1.1b",
        hidden: 2048,
        intermediate: 5632,
        layers: 22,
        heads: 32,
        kv_heads: 4,
        head_dim: 64,
        vocab: 32000,
        positions: 8192,
        rope_theta: 1e4,
    },
    Shape {
        name: "llama2-7b",
        hidden: 4096,
        intermediate: 11008,
        layers: 32,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        vocab: 32000,
        positions: 8192,
        rope_theta: 1e4,
    },
    Shape {
        name: "llama3-8b",
        hidden: 4096,
        intermediate: 14336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        positions: 8192,
        rope_theta: 5e5,
    },
    Shape {
        name: "llama2-70b",
        hidden: 8192,
        intermediate: 28672,
        layers: 80,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        vocab: 32000,
        positions: 8192,
        rope_theta: 1e4,
    },
];

/// Shapes that users may ask for and that need layers this version cannot run.
const MIXTURES: [&str; 1] = ["mixtral-8x7b"];

impl Shape {
    /// The shape of this name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        if let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) {
            return Ok(*shape);
        }
        let known = SHAPES.map(|shape| shape.name).join(", ");
        if MIXTURES.contains(&name) {
            bail!(
                "--synthetic {name}: mixture-of-experts layers are not supported yet (shapes to choose from: {known})"
            );
        }
        Err(Usage(format!(
            "--synthetic {name}: unknown shape (shapes to choose from: {known})"
        ))
        .into())
    }

    /// `config.json` of a model of this shape.
    pub(crate) fn config(&self, bits: f64) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.vocab - 2,
            "eos_token_id": self.vocab - 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "mlp_bias": false,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": false,
            "torch_dtype": "float16",
            "use_cache": true,
            "vocab_size": self.vocab,
            "quantization_config": {
                "quant_method": "exl2",
                "version": "0.3.2",
                "bits": bits,
                "head_bits": 6,
                "calibration": { "rows": 0, "length": 0, "dataset": "(random weights)" }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_consistent_and_found_by_name() {
        for shape in SHAPES {
            assert_eq!(shape.heads * shape.head_dim, shape.hidden);
            assert_eq!(
                shape.hidden % 32 + shape.intermediate % 32 + shape.vocab % 32,
                0
            );
            assert_eq!(Shape::named(shape.name).unwrap(), shape);
        }
    }

    #[test]
    fn a_mixture_fails_and_a_typo_is_wrong_usage() {
        let error = Shape::named("mixtral-8x7b").unwrap_err();
        assert!(!error.is::<Usage>() && error.to_string().contains("not supported"));
        assert!(Shape::named("llama9").unwrap_err().is::<Usage>());
    }
}
