//! GLM-4: half of each head is rotated, element by element with its neighbour, gate and up are
//! fused; the releases of April 2025 (`Glm4`) have norms on both sides.

use exl_format::{ConfigFile, FileNames};
use exl_tensor::RopeStyle;
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, phi3};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "glm",
    names: &["GlmForCausalLM"],
    parse,
    files,
};

pub(super) const GLM4: Arch = Arch {
    family: "glm4",
    names: &["Glm4ForCausalLM"],
    parse: parse_glm4,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder("glm", config, options)?.spec()
}

fn parse_glm4(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let d = decoder("glm4", config, options)?;
    d.with_post_norms("post_self_attn_layernorm", "post_mlp_layernorm")
        .spec()
}

fn decoder(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let config = config.with_defaults(&json!({
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7,
    }));
    let mut d = Decoder::new(family, &config, options)?;
    d.o_bias = false;
    d.style = RopeStyle::GptJ;
    Ok(d)
}

fn files(spec: &Spec) -> FileNames {
    FileNames {
        splits: vec![phi3::gate_up(spec)],
        ..FileNames::default()
    }
}
