//! Seed-OSS: Llama with a bias on q, k and v, and perhaps another one on o.

use exl_format::ConfigFile;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "seed_oss",
    names: &["SeedOssForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let mut d = Decoder::new("seed_oss", config, options)?;
    d.qkv_bias = p.key(&["attention_bias"]).flag()?.unwrap_or(true);
    d.o_bias = p.flag("attention_out_bias")?;
    d.spec()
}
