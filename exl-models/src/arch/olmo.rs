//! OLMo 1 (layer norms without weights), OLMo 2 (norms only on what is added, and over all heads of q
//! and k together), OLMo 3 (the same, and three of four layers slide) and OLMoE (experts).

use exl_format::{ConfigFile, RopeKind};
use exl_tensor::RouteNorm;
use serde_json::json;

use super::decoder::{Decoder, Experts};
use super::sizes::{sliding, window, windows};
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::{RopeOptions, RopeParams};
use crate::spec::{HeadNormOver, NormKind};
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "olmo",
    names: &["OlmoForCausalLM"],
    parse,
    files: plain_files,
};

pub(super) const OLMO2: Arch = Arch {
    family: "olmo2",
    names: &["Olmo2ForCausalLM"],
    parse: parse_olmo2,
    files: plain_files,
};

pub(super) const OLMO3: Arch = Arch {
    family: "olmo3",
    names: &["Olmo3ForCausalLM"],
    parse: parse_olmo3,
    files: plain_files,
};

pub(super) const OLMOE: Arch = Arch {
    family: "olmoe",
    names: &["OlmoeForCausalLM"],
    parse: parse_olmoe,
    files: plain_files,
};

fn clip(config: &ConfigFile) -> Result<Option<f32>> {
    Ok(Params(config).above_zero("clip_qkv")?.map(|c| c as f32))
}

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({"layer_norm_eps": 1e-5}));
    let mut d = Decoder::new("olmo", &config, options)?;
    d.norm = NormKind::Plain;
    d.clip = clip(&config)?;
    d.spec()
}

fn olmo2(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let mut d = Decoder::new(family, config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Row));
    (d.names.attn_norm, d.names.mlp_norm) = (None, None);
    Ok(d.with_post_norms("post_attention_layernorm", "post_feedforward_layernorm"))
}

fn parse_olmo2(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    olmo2("olmo2", config, options)?.spec()
}

fn parse_olmo3(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({"rms_norm_eps": 1e-5, "sliding_window": 4096}));
    let p = Params(&config);
    let mut d = olmo2("olmo3", &config, options)?;
    let slides = sliding(p, |i| !(i + 1).is_multiple_of(4))?;
    d.windows = windows(&slides, window(p)?);
    // What is done for longer contexts concerns the layers that see them.
    let (kind, head_dim) = (Some("sliding_attention"), d.sizes.head_dim);
    let mut local = RopeParams::read(&config, kind, head_dim, d.max_context)?;
    local.kind = RopeKind::Default;
    d.ropes.push(local.table(&RopeOptions::default()));
    d.layer_ropes = slides.iter().map(|&s| Some(usize::from(s))).collect();
    d.spec()
}

fn parse_olmoe(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let mut d = Decoder::new("olmoe", config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Row));
    d.clip = clip(config)?;
    let norm = match p.flag("norm_topk_prob")? {
        true => RouteNorm::Sum,
        false => RouteNorm::None,
    };
    d.experts = Some(Experts::read(p, d.sizes.inner, norm)?);
    d.spec()
}
