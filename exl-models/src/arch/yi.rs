//! Yi of 2023, whose norms have names of their own. Later ones are saved as Llama.

use exl_format::{ConfigFile, FileNames};

use super::Arch;
use super::decoder::Decoder;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "yi",
    names: &["YiForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    Decoder::new("yi", config, options)?.spec()
}

fn files(_: &Spec) -> FileNames {
    FileNames::renaming(&[
        (".ln1.", ".input_layernorm."),
        (".ln2.", ".post_attention_layernorm."),
    ])
}
