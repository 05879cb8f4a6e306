//! Arcee: Llama with an MLP of one branch, whose activation is the square of a rectifier.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "arcee",
    names: &["ArceeForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    }));
    let mut d = Decoder::new("arcee", &config, options)?;
    d.names.gate = None;
    d.spec()
}
