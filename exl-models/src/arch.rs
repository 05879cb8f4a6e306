//! The families of architectures and how to recognise them.
//!
//! A family is one [`Arch`] in a file of its own below `arch/`: the names it answers to and a
//! function from configuration to [`Spec`]. The list of weights and the forward pass follow from
//! the spec.

mod dense;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use exl_format::ConfigFile;

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
}

/// Every known family.
pub fn registry() -> &'static [Arch] {
    &[llama::ARCH, mistral::ARCH, qwen2::ARCH, qwen3::ARCH]
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
