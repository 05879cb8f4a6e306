//! The families of architectures and how to recognise them.
//!
//! A family is one [`Arch`] in a file of its own below `arch/`: the names it answers to and a
//! function from configuration to [`Spec`]. The list of weights and the forward pass follow from
//! the spec.

mod arcee;
mod build;
mod cohere;
mod dbrx;
mod decoder;
mod ernie;
mod exaone4;
mod gemma;
mod gemma3;
mod glm;
mod gpt2;
mod granite;
mod index;
mod internlm2;
mod llama;
mod minicpm;
mod mistral;
mod mixtral;
mod olmo;
mod orion;
mod phi3;
mod qwen1;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod seed_oss;
mod sizes;
mod smollm3;
mod stablelm;
mod starcoder2;
mod yi;

use exl_format::{ConfigFile, FileNames};

use crate::rope::RopeOptions;
use crate::{Error, Result, Spec};

/// One family of architectures.
#[derive(Clone, Copy, Debug)]
pub struct Arch {
    /// Name of the family.
    pub family: &'static str,
    /// Entries of `architectures` it answers to.
    pub names: &'static [&'static str],
    /// Reads a configuration.
    pub parse: fn(&ConfigFile, &RopeOptions) -> Result<Spec>,
    /// How the tensors of its files get the names of the spec.
    pub files: fn(&Spec) -> FileNames,
}

/// Files that use the names of the spec.
fn plain_files(_: &Spec) -> FileNames {
    FileNames::default()
}

/// Every known family.
pub fn registry() -> &'static [Arch] {
    &[
        llama::ARCH,
        mistral::ARCH,
        mistral::MULTIMODAL,
        mixtral::ARCH,
        yi::ARCH,
        index::ARCH,
        internlm2::ARCH,
        orion::ARCH,
        minicpm::ARCH,
        qwen1::ARCH,
        qwen2::ARCH,
        qwen2::MULTIMODAL,
        qwen2_moe::ARCH,
        qwen3::ARCH,
        qwen3::MOE,
        gemma::ARCH,
        gemma::GEMMA2,
        gemma::GEMMOE,
        gemma3::ARCH,
        gemma3::MULTIMODAL,
        glm::ARCH,
        glm::GLM4,
        phi3::ARCH,
        cohere::ARCH,
        cohere::COHERE2,
        granite::ARCH,
        starcoder2::ARCH,
        gpt2::ARCH,
        gpt2::BIGCODE,
        dbrx::ARCH,
        olmo::ARCH,
        olmo::OLMO2,
        olmo::OLMO3,
        olmo::OLMOE,
        smollm3::ARCH,
        stablelm::ARCH,
        exaone4::ARCH,
        seed_oss::ARCH,
        ernie::ARCH,
        arcee::ARCH,
    ]
}

/// The family of a configuration; with `assume_llama`, an unknown one is taken for Llama.
///
/// # Errors
/// [`Error::UnknownArchitecture`]; [`Error::Format`] when `architectures` is not one name.
pub fn detect(config: &ConfigFile, assume_llama: bool) -> Result<Arch> {
    let name = config.architecture()?;
    let known = registry().iter().find(|a| a.names.contains(&name));
    match known {
        Some(arch) => Ok(*arch),
        None if assume_llama => Ok(llama::ARCH),
        None => Err(Error::UnknownArchitecture {
            file: config.path().to_owned(),
            found: name.to_owned(),
            nearest: nearest(name),
            differs: differs(config, nearest(name)),
        }),
    }
}

/// Reads a configuration into a spec.
///
/// # Errors
/// As [`detect`], and [`Error::Format`] from the family's rules, [`Error::Option`].
pub fn parse(config: &ConfigFile, options: &RopeOptions, assume_llama: bool) -> Result<Spec> {
    check_options(options)?;
    let arch = detect(config, assume_llama)?;
    (arch.parse)(config, options)
}

fn check_options(options: &RopeOptions) -> Result<()> {
    let named = [
        ("--rope-scale", options.scale),
        ("--rope-alpha", options.alpha),
    ];
    for (flag, value) in named {
        if let Some(found) = value.filter(|v| !(*v > 0.0 && v.is_finite())) {
            return Err(Error::Option {
                flag,
                found: found.to_string(),
            });
        }
    }
    match options.context {
        Some(0) => Err(Error::Option {
            flag: "--context",
            found: "0".to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The known name with the smallest edit distance.
fn nearest(name: &str) -> &'static str {
    let names = registry().iter().flat_map(|a| a.names);
    names
        .min_by_key(|known| distance(known, name))
        .copied()
        .unwrap_or("none")
}

/// Keys that are in every configuration and say nothing about what is computed.
const NEUTRAL: [&str; 23] = [
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "quantization_config",
    "resid_pdrop",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "text_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vision_config",
];

/// What the family of a name would not understand of a configuration, and what it would miss.
fn differs(config: &ConfigFile, name: &str) -> String {
    let Some(arch) = registry().iter().find(|a| a.names.contains(&name)) else {
        return String::new();
    };
    let watched = config.watched();
    let parsed = (arch.parse)(&watched, &RopeOptions::default());
    let missing = match parsed {
        Err(Error::Format(exl_format::Error::Config { key, .. })) => {
            format!(", which needs {key}")
        }
        _ => String::new(),
    };
    let unknown = watched.unasked().into_iter();
    let unknown: Vec<&str> = unknown.filter(|k| !NEUTRAL.contains(k)).collect();
    match unknown.is_empty() {
        true => missing,
        false => format!("{missing}, which does not know {}", unknown.join(", ")),
    }
}

/// Levenshtein distance over bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
