//! Llama 1 to 3.x and what is saved under its name: CodeLlama, TinyLlama, Vicuna, Yi, Solar.

use exl_format::ConfigFile;

use super::Arch;
use super::dense::Dense;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "llama",
    names: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    parse,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let bias = Params(config).flag("attention_bias")?;
    Dense {
        family: "llama",
        qkv_bias: bias,
        o_bias: bias,
        head_norm: false,
        windows: vec![],
    }
    .spec(config, options)
}
