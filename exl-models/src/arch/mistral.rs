//! Mistral 7B, Nemo (heads wider than `hidden / heads`), Small, Ministral.

use exl_format::ConfigFile;

use super::Arch;
use super::dense::{Dense, windows};
use crate::params::{MAX_CONTEXT, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "mistral",
    names: &["MistralForCausalLM"],
    parse,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let bias = p.flag("attention_bias")?;
    // transformers would take 4096 for an absent key; published files say null from 0.2 on.
    let window = p
        .positive(&["sliding_window", "sliding_window_size"], MAX_CONTEXT)?
        .unwrap_or(0);
    Dense {
        family: "mistral",
        qkv_bias: bias,
        o_bias: bias,
        head_norm: false,
        windows: windows(p, window, |_| true)?,
    }
    .spec(config, options)
}
