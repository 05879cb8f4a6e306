//! Orion: Llama with layer norms.

use exl_format::ConfigFile;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::rope::RopeOptions;
use crate::spec::NormKind;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "orion",
    names: &["OrionForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = Decoder::new("orion", config, options)?;
    d.norm = NormKind::Layer { bias: true };
    d.spec()
}
