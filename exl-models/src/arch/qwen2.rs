//! Qwen 1.5, 2, 2.5 and QwQ: Llama with a bias on q, k and v; and the text side of Qwen2-VL and
//! Qwen2.5-VL, whose rotary positions have three axes.

use exl_format::{ConfigFile, FileNames};

use super::decoder::Decoder;
use super::sizes::{sliding, windows};
use super::{Arch, plain_files};
use crate::params::{MAX_CONTEXT, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "qwen2",
    names: &["Qwen2ForCausalLM"],
    parse,
    files: plain_files,
};

/// With a vision tower that is not run.
pub(super) const MULTIMODAL: Arch = Arch {
    family: "qwen2_vl",
    names: &[
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
    ],
    parse: parse_multimodal,
    files: multimodal_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder("qwen2", config, options)?.spec()
}

fn parse_multimodal(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = decoder("qwen2_vl", config, options)?;
    d.towers = &["visual."];
    d.spec()
}

fn decoder(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let mut d = Decoder::new(family, config, options)?;
    (d.qkv_bias, d.o_bias) = (true, false);
    d.windows = upper_windows(Params(config))?;
    Ok(d)
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
    Ok(windows(&sliding(p, |layer| layer >= first)?, window))
}

/// The prefixes of transformers 5.
fn multimodal_files(_: &Spec) -> FileNames {
    FileNames::renaming(&[
        ("$model.language_model.", "model."),
        ("$model.visual.", "visual."),
    ])
}
