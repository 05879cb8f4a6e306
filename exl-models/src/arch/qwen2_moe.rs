//! Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of which every token goes through.

use exl_format::ConfigFile;
use exl_tensor::RouteNorm;

use super::decoder::{Decoder, Experts};
use super::qwen2::upper_windows;
use super::{Arch, plain_files};
use crate::params::{MAX_SIZE, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen2_moe",
    names: &["Qwen2MoeForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let p = Params(config);
    let mut d = Decoder::new("qwen2_moe", config, options)?;
    d.qkv_bias = p.key(&["qkv_bias"]).flag()?.unwrap_or(true);
    d.o_bias = false;
    d.windows = upper_windows(p)?;
    let mut experts = experts(p, d.sizes.layers)?;
    experts.shared = p.positive(&["shared_expert_intermediate_size"], MAX_SIZE)?;
    d.experts = Some(experts);
    d.spec()
}

/// Experts under Qwen's keys. Layers in `mlp_only_layers`, and those that `decoder_sparse_step`
/// leaves out, have an MLP.
pub(super) fn experts(p: Params<'_>, layers: usize) -> Result<Experts> {
    let step = p.positive(&["decoder_sparse_step"], MAX_SIZE)?.unwrap_or(1);
    let only = p.key(&["mlp_only_layers"]).integers()?.unwrap_or_default();
    let norm = match p.flag("norm_topk_prob")? {
        true => RouteNorm::Sum,
        false => RouteNorm::None,
    };
    let inner = p.size(&["moe_intermediate_size"], MAX_SIZE)?;
    let mut experts = Experts::read(p, inner, norm)?;
    let dense = |i: usize| only.contains(&i) || !(i + 1).is_multiple_of(step);
    experts.dense = (0..layers).map(dense).collect();
    Ok(experts)
}
