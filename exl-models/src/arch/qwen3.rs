//! Qwen3: RMS norms over the heads of q and k, head width independent of the hidden size; and
//! Qwen3-MoE.

use exl_format::ConfigFile;

use super::decoder::Decoder;
use super::qwen2::upper_windows;
use super::qwen2_moe::experts;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::spec::HeadNormOver;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen3",
    names: &["Qwen3ForCausalLM"],
    parse,
    files: plain_files,
};

/// With experts.
pub(super) const MOE: Arch = Arch {
    family: "qwen3_moe",
    names: &["Qwen3MoeForCausalLM"],
    parse: parse_moe,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder("qwen3", config, options)?.spec()
}

fn parse_moe(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = decoder("qwen3_moe", config, options)?;
    d.experts = Some(experts(Params(config), d.sizes.layers)?);
    d.spec()
}

fn decoder(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let mut d = Decoder::new(family, config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Head));
    d.windows = upper_windows(Params(config))?;
    Ok(d)
}
