//! Qwen3 dense: RMS norms over the heads of q and k, head width independent of the hidden size.

use exl_format::ConfigFile;

use super::Arch;
use super::dense::Dense;
use super::qwen2::upper_windows;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen3",
    names: &["Qwen3ForCausalLM"],
    parse,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let bias = Params(config).flag("attention_bias")?;
    Dense {
        family: "qwen3",
        qkv_bias: bias,
        o_bias: bias,
        head_norm: true,
        windows: upper_windows(Params(config))?,
    }
    .spec(config, options)
}
