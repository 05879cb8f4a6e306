//! StableLM: layer norms, a quarter of each head rotated, in some attention and MLP side by side.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::spec::NormKind;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "stablelm",
    names: &["StableLmForCausalLM", "StableLMEpochForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5,
    }));
    let p = Params(&config);
    let qk_layernorm = p.key(&["qk_layernorm"]);
    if qk_layernorm.flag()?.unwrap_or(false) {
        return Err(qk_layernorm
            .error("false (norms of single heads are not read)", "true")
            .into());
    }
    let mut d = Decoder::new("stablelm", &config, options)?;
    d.norm = NormKind::Layer { bias: true };
    (d.qkv_bias, d.o_bias) = (p.flag("use_qkv_bias")?, false);
    d.parallel = p.flag("use_parallel_residual")?;
    d.spec()
}
