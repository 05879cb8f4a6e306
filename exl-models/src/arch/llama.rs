//! Llama 1 to 3.x and what is saved under its name: CodeLlama, TinyLlama, Vicuna, Yi, Solar,
//! DeepSeek LLM.

use exl_format::{ConfigFile, FileNames, Split};

use super::Arch;
use super::decoder::Decoder;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "llama",
    names: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    Decoder::new("llama", config, options)?.spec()
}

/// Some checkpoints hold gate and up as one matrix.
pub(super) fn files(spec: &Spec) -> FileNames {
    let inner = spec.dense_inner();
    FileNames {
        splits: vec![
            Split::consecutive(
                "mlp.swiglu.w12",
                &[("mlp.gate_proj", inner), ("mlp.up_proj", inner)],
            ),
            Split::whole("mlp.swiglu.w3", "mlp.down_proj"),
        ],
        ..FileNames::default()
    }
}
