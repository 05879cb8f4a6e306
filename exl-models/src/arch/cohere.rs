//! Command R and Aya: attention and MLP side by side behind one layer norm, neighbouring elements
//! rotated; in the second generation (Command R7B, Command A) only in layers that slide.

use exl_format::ConfigFile;
use exl_tensor::RopeStyle;
use serde_json::json;

use super::decoder::Decoder;
use super::sizes::{sliding, window, windows};
use super::{Arch, plain_files};
use crate::params::{MAX_LAYERS, Params};
use crate::rope::RopeOptions;
use crate::spec::{HeadNormOver, NormKind};
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "cohere",
    names: &["CohereForCausalLM"],
    parse,
    files: plain_files,
};

pub(super) const COHERE2: Arch = Arch {
    family: "cohere2",
    names: &["Cohere2ForCausalLM"],
    parse: parse_cohere2,
    files: plain_files,
};

fn decoder(family: &'static str, config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let mut d = Decoder::new(family, config, options)?;
    d.norm = NormKind::Layer { bias: false };
    d.parallel = true;
    d.style = RopeStyle::GptJ;
    d.logit_scale = Params(config).number("logit_scale")?.unwrap_or(0.0625) as f32;
    Ok(d)
}

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "tie_word_embeddings": true, "layer_norm_eps": 1e-5,
    }));
    let mut d = decoder("cohere", &config, options)?;
    if Params(&config).flag("use_qk_norm")? {
        d.head_norm = Some((d.norm, HeadNormOver::EachHead));
    }
    d.spec()
}

fn parse_cohere2(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "tie_word_embeddings": true, "layer_norm_eps": 1e-5, "sliding_window": 4096,
    }));
    let p = Params(&config);
    let mut d = decoder("cohere2", &config, options)?;
    let keys = ["sliding_window_pattern", "_sliding_window_pattern"];
    let pattern = p.positive(&keys, MAX_LAYERS)?.unwrap_or(4);
    let slides = sliding(p, |i| !(i + 1).is_multiple_of(pattern))?;
    d.windows = windows(&slides, window(p)?);
    d.layer_ropes = slides.iter().map(|&s| s.then_some(0)).collect();
    d.spec()
}
