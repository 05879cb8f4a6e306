//! Mixtral 8x7B and 8x22B: Mistral with experts.

use exl_format::ConfigFile;
use exl_tensor::RouteNorm;

use super::decoder::{Decoder, Experts};
use super::sizes::window;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "mixtral",
    names: &["MixtralForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let mut d = Decoder::new("mixtral", config, options)?;
    d.windows = vec![window(p)?; d.sizes.layers];
    d.experts = Some(experts(p, d.sizes.inner)?);
    d.spec()
}

/// Experts under Mixtral's names.
pub(super) fn experts(p: Params<'_>, inner: usize) -> Result<Experts> {
    let mut experts = Experts::read(p, inner, RouteNorm::Sum)?;
    experts.block = "block_sparse_moe";
    experts.names = ["w1", "w3", "w2"];
    Ok(experts)
}
