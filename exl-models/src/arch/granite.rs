//! Granite 3: Llama with four multipliers.

use exl_format::ConfigFile;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "granite",
    names: &["GraniteForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let mut d = Decoder::new("granite", config, options)?;
    // transformers' default for each of the four is 1.
    d.embed_scale = p.number("embedding_multiplier")?.unwrap_or(1.0) as f32;
    d.residual_scale = p.number("residual_multiplier")?.unwrap_or(1.0) as f32;
    d.scale = p.number("attention_multiplier")?.unwrap_or(1.0) as f32;
    d.logit_scale = (1.0 / p.above_zero("logits_scaling")?.unwrap_or(1.0)) as f32;
    d.spec()
}
