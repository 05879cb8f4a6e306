//! Gemma 1 and 2: RMS norms with an offset, an embedding multiplied by the root of its width, a head
//! that is the embedding; in Gemma 2 norms on both sides, soft-caps and sliding layers. Gemmoe is
//! Gemma with experts.

use exl_format::ConfigFile;
use exl_tensor::Activation;
use serde_json::json;

use super::decoder::Decoder;
use super::sizes::{sliding, window, windows};
use super::{Arch, mixtral, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::spec::NormKind;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "gemma",
    names: &["GemmaForCausalLM"],
    parse,
    files: plain_files,
};

pub(super) const GEMMA2: Arch = Arch {
    family: "gemma2",
    names: &["Gemma2ForCausalLM"],
    parse: parse_gemma2,
    files: plain_files,
};

pub(super) const GEMMOE: Arch = Arch {
    family: "gemmoe",
    names: &["GemmoeForCausalLM"],
    parse: parse_gemmoe,
    files: plain_files,
};

/// What all of them have.
pub(super) fn decoder(
    family: &'static str,
    config: &ConfigFile,
    options: &RopeOptions,
) -> Result<Decoder> {
    let config = config.with_defaults(&json!({"tie_word_embeddings": true}));
    let p = Params(&config);
    let mut d = Decoder::new(family, &config, options)?;
    d.norm = NormKind::Rms { offset: 1.0 };
    d.embed_scale = (d.sizes.hidden as f32).sqrt();
    // The older key, `hidden_act`, says gelu and means the approximation.
    let newer = p.key(&["hidden_activation"]);
    d.act = match newer.string()? {
        Some("gelu") => Activation::Gelu,
        None | Some("gelu_pytorch_tanh") => Activation::GeluTanh,
        Some(other) => return Err(newer.error("gelu or gelu_pytorch_tanh", other).into()),
    };
    if let Some(scalar) = p.above_zero("query_pre_attn_scalar")? {
        d.scale = scalar.powf(-0.5) as f32;
    }
    Ok(d)
}

/// As [`decoder`], with a norm on both sides of each half.
pub(super) fn sandwich(
    family: &'static str,
    config: &ConfigFile,
    options: &RopeOptions,
) -> Result<Decoder> {
    let mut d = decoder(family, config, options)?;
    d.names.mlp_norm = Some("pre_feedforward_layernorm");
    d = d.with_post_norms("post_attention_layernorm", "post_feedforward_layernorm");
    let p = Params(config);
    d.softcap = p.number("attn_logit_softcapping")?.unwrap_or(0.0) as f32;
    d.final_softcap = p.number("final_logit_softcapping")?.unwrap_or(0.0) as f32;
    Ok(d)
}

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder("gemma", config, options)?.spec()
}

fn parse_gemma2(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({"query_pre_attn_scalar": 256}));
    let p = Params(&config);
    let mut d = sandwich("gemma2", &config, options)?;
    let every_other = sliding(p, |i| i.is_multiple_of(2))?;
    d.windows = windows(&every_other, window(p)?);
    d.spec()
}

fn parse_gemmoe(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = decoder("gemmoe", config, options)?;
    d.experts = Some(mixtral::experts(Params(config), d.sizes.inner)?);
    d.spec()
}
