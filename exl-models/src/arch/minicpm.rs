//! MiniCPM 1 and 2: Llama with multipliers on the embedding, the residual and the logits.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::params::{MAX_SIZE, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "minicpm",
    names: &["MiniCPMForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({"tie_word_embeddings": true}));
    let p = Params(&config);
    let mut d = Decoder::new("minicpm", &config, options)?;
    d.embed_scale = p.number("scale_emb")?.unwrap_or(1.0) as f32;
    let depth = p.number("scale_depth")?;
    d.residual_scale = depth.map_or(1.0, |s| s / (d.sizes.layers as f64).sqrt()) as f32;
    let base = p.positive(&["dim_model_base"], MAX_SIZE)?;
    d.logit_scale = base.map_or(1.0, |b| b as f64 / d.sizes.hidden as f64) as f32;
    d.spec()
}
