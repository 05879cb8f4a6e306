//! Qwen 1.5, 2, 2.5 and QwQ: Llama with a bias on q, k and v.

use exl_format::ConfigFile;

use super::Arch;
use super::dense::{Dense, windows};
use crate::params::{MAX_CONTEXT, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen2",
    names: &["Qwen2ForCausalLM"],
    parse,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    Dense {
        family: "qwen2",
        qkv_bias: true,
        o_bias: false,
        head_norm: false,
        windows: upper_windows(Params(config))?,
    }
    .spec(config, options)
}

/// Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on slide.
pub(super) fn upper_windows(p: Params<'_>) -> Result<Vec<usize>> {
    if !p.flag("use_sliding_window")? {
        return Ok(vec![]);
    }
    let window = p
        .positive(&["sliding_window"], MAX_CONTEXT)?
        .unwrap_or(4096);
    let first = p.key(&["max_window_layers"]).integer()?.unwrap_or(28);
    windows(p, window, |layer| layer >= first)
}
