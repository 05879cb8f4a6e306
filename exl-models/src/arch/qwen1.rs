//! Qwen 7B to 72B of 2023: Llama with other keys and names, a fused q/k/v with a bias, and a width of
//! the MLP that counts both branches.

use exl_format::{ConfigFile, FileNames, Split};
use serde_json::json;

use super::Arch;
use super::decoder::Decoder;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen",
    names: &["QWenLMHeadModel"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let theta = p.key(&["rotary_emb_base"]).number()?.unwrap_or(10_000.0);
    let context = p
        .key(&["seq_length", "max_position_embeddings"])
        .integer()?;
    // `use_dynamic_ntk` and `use_logn_attn` change nothing up to the trained length.
    let config = config.with_defaults(&json!({
        "rope_theta": theta, "max_sequence_length": context.unwrap_or(8192),
        "layer_norm_epsilon": 1e-6,
    }));
    let mut d = Decoder::new("qwen", &config, options)?;
    (d.qkv_bias, d.o_bias) = (true, false);
    d.sizes.inner /= 2;
    d.spec()
}

fn files(spec: &Spec) -> FileNames {
    let (q, kv) = spec.qkv_outputs();
    let parts = [
        ("self_attn.q_proj", q),
        ("self_attn.k_proj", kv),
        ("self_attn.v_proj", kv),
    ];
    let mut names = FileNames::renaming(&[
        ("$transformer.wte.", "model.embed_tokens."),
        ("$transformer.ln_f.", "model.norm."),
        ("$transformer.h.", "model.layers."),
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".attn.c_attn.", ".self_attn.c_attn."),
        (".mlp.w2.", ".mlp.gate_proj."),
        (".mlp.w1.", ".mlp.up_proj."),
        (".mlp.c_proj.", ".mlp.down_proj."),
    ]);
    names.splits = vec![Split::consecutive("self_attn.c_attn", &parts)];
    names
}
