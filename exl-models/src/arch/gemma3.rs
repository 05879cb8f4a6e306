//! Gemma 3: norms over the heads of q and k, five sliding layers with rotary positions of their own
//! for each global one.

use exl_format::{ConfigFile, FileNames};
use serde_json::json;

use super::decoder::Decoder;
use super::gemma::sandwich;
use super::sizes::{sliding, window, windows};
use super::{Arch, mistral, plain_files};
use crate::Result;
use crate::params::{MAX_LAYERS, Params};
use crate::rope::{RopeOptions, RopeParams};
use crate::spec::{HeadNormOver, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "gemma3",
    names: &["Gemma3ForCausalLM"],
    parse,
    files: plain_files,
};

/// With a vision tower that is not run.
pub(super) const MULTIMODAL: Arch = Arch {
    family: "gemma3",
    names: &["Gemma3ForConditionalGeneration"],
    parse: parse_multimodal,
    files: multimodal_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder(config, options)?.spec()
}

fn parse_multimodal(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let mut d = decoder(config, options)?;
    d.prefix = "language_model.";
    d.towers = mistral::TOWERS;
    d.spec()
}

fn decoder(config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    // Published files leave out what transformers' defaults say.
    let config = config.with_defaults(&json!({
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    }));
    let p = Params(&config);
    let mut d = sandwich("gemma3", &config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Head));
    let keys = ["sliding_window_pattern", "_sliding_window_pattern"];
    let pattern = p.positive(&keys, MAX_LAYERS)?.unwrap_or(6);
    let slides = sliding(p, |i| !(i + 1).is_multiple_of(pattern))?;
    d.windows = windows(&slides, window(p)?);
    let table = |kind, options: &RopeOptions| -> Result<_> {
        let (head_dim, context) = (d.sizes.head_dim, d.max_context);
        Ok(RopeParams::read(&config, Some(kind), head_dim, context)?.table(options))
    };
    // What is asked for longer contexts concerns the layers that see them.
    let local = table("sliding_attention", &RopeOptions::default())?;
    d.ropes = vec![table("full_attention", options)?, local];
    d.layer_ropes = slides.iter().map(|&s| Some(usize::from(s))).collect();
    Ok(d)
}

fn multimodal_files(spec: &Spec) -> FileNames {
    let mut names = mistral::multimodal_files(spec);
    let weight = ("mm_input_projection_weight", "mm_input_projection.weight");
    names
        .renames
        .push((weight.0.to_owned(), weight.1.to_owned()));
    names
}
