//! StarCoder2: layer norms, an MLP of one branch, biases everywhere.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::sizes::window;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::spec::NormKind;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "starcoder2",
    names: &["Starcoder2ForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "tie_word_embeddings": true, "hidden_act": "gelu_pytorch_tanh", "use_bias": true,
        "norm_epsilon": 1e-5,
    }));
    let p = Params(&config);
    let mut d = Decoder::new("starcoder2", &config, options)?;
    d.norm = NormKind::Layer { bias: true };
    let bias = p.flag("use_bias")?;
    (d.qkv_bias, d.o_bias, d.mlp_bias) = (bias, bias, bias);
    (d.names.gate, d.names.up, d.names.down) = (None, "c_fc", "c_proj");
    d.windows = vec![window(p)?; d.sizes.layers];
    d.spec()
}
