//! Llama 1 to 3.x and what is saved under its name: CodeLlama, TinyLlama, Vicuna, Yi, Solar.

use super::Arch;
use super::dense::Dense;
use crate::rope::RopeOptions;
use crate::{Params, Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "llama",
    names: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    parse,
};

fn parse(p: &Params<'_>, options: &RopeOptions) -> Result<Spec> {
    let bias = p.flag(&["attention_bias"])?;
    Dense {
        family: "llama",
        qkv_bias: bias,
        o_bias: bias,
        head_norm: false,
        windows: vec![],
    }
    .spec(p, options)
}
