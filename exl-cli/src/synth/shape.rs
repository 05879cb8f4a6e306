//! Sizes of known models.

use crate::failure::Usage;
use anyhow::Result;
use serde_json::{Value, json};

/// The sizes that decide how fast a Llama-like model runs.
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
    /// In place of one MLP.
    pub(crate) experts: Option<Experts>,
}

/// Experts of a layer, each as wide as [`Shape::intermediate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Experts {
    pub(crate) count: usize,
    /// Those that a token goes through.
    pub(crate) top_k: usize,
}

const SHAPES: [Shape; 7] = [
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
        experts: None,
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
        experts: None,
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
        experts: None,
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
        experts: None,
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
        experts: None,
    },
    Shape {
        name: "mixtral-8x7b",
        hidden: 4096,
        intermediate: 14336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 32000,
        positions: 8192,
        rope_theta: 1e6,
        experts: Some(Experts { count: 8, top_k: 2 }),
    },
    // As small as the first, with experts.
    Shape {
        name: "smoke-8x1m",
        hidden: 256,
        intermediate: 704,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 2048,
        positions: 8192,
        rope_theta: 1e4,
        experts: Some(Experts { count: 8, top_k: 2 }),
    },
];

impl Shape {
    /// The shape of this name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        if let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) {
            return Ok(*shape);
        }
        let known = SHAPES.map(|shape| shape.name).join(", ");
        Err(Usage(format!(
            "--synthetic {name}: unknown shape (shapes to choose from: {known})"
        ))
        .into())
    }

    /// `config.json` of a model of this shape.
    pub(crate) fn config(&self, bits: f64) -> Value {
        let (class, kind) = match self.experts {
            None => ("LlamaForCausalLM", "llama"),
            Some(_) => ("MixtralForCausalLM", "mixtral"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": kind,
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
        });
        if let Some(experts) = self.experts {
            config["num_local_experts"] = json!(experts.count);
            config["num_experts_per_tok"] = json!(experts.top_k);
            config["sliding_window"] = Value::Null;
        }
        config
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
    fn a_typo_is_wrong_usage() {
        assert!(Shape::named("llama9").unwrap_err().is::<Usage>());
    }

    #[test]
    fn a_mixture_is_mixtral() {
        let config = Shape::named("mixtral-8x7b").unwrap().config(3.5);
        assert_eq!(config["architectures"][0], "MixtralForCausalLM");
        assert_eq!(config["num_local_experts"], 8);
    }
}
