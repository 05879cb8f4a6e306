//! Mistral 7B, Nemo (heads wider than `hidden / heads`), Small, Ministral, and the text side of
//! Pixtral and Mistral Small 3.1.

use exl_format::{ConfigFile, FileNames};

use super::decoder::Decoder;
use super::sizes::{sliding, window, windows};
use super::{Arch, plain_files};
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "mistral",
    names: &["MistralForCausalLM", "MinistralForCausalLM"],
    parse,
    files: plain_files,
};

/// With a vision tower that is not run.
pub(super) const MULTIMODAL: Arch = Arch {
    family: "mistral",
    names: &[
        "Mistral3ForConditionalGeneration",
        "LlavaForConditionalGeneration",
    ],
    parse: parse_multimodal,
    files: multimodal_files,
};

fn decoder(config: &ConfigFile, options: &RopeOptions) -> Result<Decoder> {
    let p = Params(config);
    let mut d = Decoder::new("mistral", config, options)?;
    // transformers would take 4096 for an absent key; published files say null from 0.2 on.
    d.windows = windows(&sliding(p, |_| true)?, window(p)?);
    Ok(d)
}

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    decoder(config, options)?.spec()
}

fn parse_multimodal(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let tower = config.key(&["vision_config->model_type"]);
    if tower.string()?.is_some_and(|t| t != "pixtral") {
        let found = tower.string()?.unwrap_or_default();
        return Err(tower
            .error("pixtral (other Llava models are not read)", found)
            .into());
    }
    // Published files leave out what transformers' defaults for the text side say.
    let config = config.with_defaults(&serde_json::json!({
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
    }));
    let mut d = decoder(&config, options)?;
    d.prefix = "language_model.";
    d.towers = TOWERS;
    d.spec()
}

/// Names of transformers 4.
pub(super) const TOWERS: &[&str] = &["vision_tower.", "multi_modal_projector."];

/// The prefixes of transformers 4 and 5.
pub(super) fn multimodal_files(_: &Spec) -> FileNames {
    FileNames::renaming(&[
        ("$model.language_model.", "language_model.model."),
        ("$lm_head.", "language_model.lm_head."),
        ("$model.vision_tower.", "vision_tower."),
        ("$model.multi_modal_projector.", "multi_modal_projector."),
    ])
}
