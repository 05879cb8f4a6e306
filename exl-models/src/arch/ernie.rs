//! ERNIE 4.5 without experts: Llama with neighbouring elements rotated, and one switch for all biases.

use exl_format::ConfigFile;
use exl_tensor::RopeStyle;
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "ernie4.5",
    names: &["Ernie4_5ForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "max_position_embeddings": 131_072, "tie_word_embeddings": true,
    }));
    let mut d = Decoder::new("ernie4.5", &config, options)?;
    d.style = RopeStyle::GptJ;
    let bias = Params(&config).flag("use_bias")?;
    (d.qkv_bias, d.o_bias, d.mlp_bias) = (bias, bias, bias);
    d.spec()
}
