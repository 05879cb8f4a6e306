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

use crate::rope::RopeOptions;
use crate::{Error, Params, Result, Spec};

/// One family of architectures.
#[derive(Clone, Copy, Debug)]
pub struct Arch {
    /// Name of the family.
    pub family: &'static str,
    /// Entries of `architectures` it answers to.
    pub names: &'static [&'static str],
    /// Reads a configuration.
    pub parse: fn(&Params<'_>, &RopeOptions) -> Result<Spec>,
}

/// Every known family.
pub fn registry() -> &'static [Arch] {
    &[llama::ARCH, mistral::ARCH, qwen2::ARCH, qwen3::ARCH]
}

/// The family of a configuration; with `assume_llama`, an unknown one is taken for Llama.
///
/// # Errors
/// [`Error::UnknownArchitecture`]; [`Error::Config`] when `architectures` is not one text.
pub fn detect(params: &Params<'_>, assume_llama: bool) -> Result<Arch> {
    let name = architecture(params)?;
    let known = registry().iter().find(|a| a.names.contains(&name));
    match known {
        Some(arch) => Ok(*arch),
        None if assume_llama => Ok(llama::ARCH),
        None => Err(Error::UnknownArchitecture {
            file: params.file().to_owned(),
            found: name.to_owned(),
            nearest: nearest(name),
        }),
    }
}

/// Reads a configuration into a spec.
///
/// # Errors
/// As [`detect`], and [`Error::Config`] from the family's rules.
pub fn parse(params: &Params<'_>, options: &RopeOptions, assume_llama: bool) -> Result<Spec> {
    check_options(params, options)?;
    let arch = detect(params, assume_llama)?;
    (arch.parse)(params, options)
}

fn architecture<'a>(params: &Params<'a>) -> Result<&'a str> {
    let keys = ["architectures"];
    let names = params
        .texts(&keys)?
        .ok_or_else(|| params.error(&keys, "missing"))?;
    match names[..] {
        [name] => Ok(name),
        _ => Err(params.error(&keys, format!("expected one name, found {}", names.len()))),
    }
}

fn check_options(params: &Params<'_>, options: &RopeOptions) -> Result<()> {
    let named = [
        ("--rope-scale", options.scale),
        ("--rope-alpha", options.alpha),
    ];
    for (flag, value) in named {
        if value.is_some_and(|v| !(v > 0.0 && v.is_finite())) {
            return Err(params.error(&[flag], "expected a number above 0"));
        }
    }
    if options.context == Some(0) {
        return Err(params.error(&["--context"], "expected a number above 0"));
    }
    Ok(())
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
