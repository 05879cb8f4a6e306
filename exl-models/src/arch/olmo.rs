//! OLMo 1 (layer norms without weights), OLMo 2 (norms only on what is added, and over all heads of q
//! and k together) and OLMoE (experts).

use exl_format::ConfigFile;
use exl_tensor::RouteNorm;

use super::decoder::{Decoder, Experts};
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
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
    let config = config.with_defaults(&serde_json::json!({"layer_norm_eps": 1e-5}));
    let mut d = Decoder::new("olmo", &config, options)?;
    d.norm = NormKind::Plain;
    d.clip = clip(&config)?;
    d.spec()
}

fn parse_olmo2(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = Decoder::new("olmo2", config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Row));
    (d.names.attn_norm, d.names.mlp_norm) = (None, None);
    d.with_post_norms("post_attention_layernorm", "post_feedforward_layernorm")
        .spec()
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
