//! Index: Llama with head rows of length one.

use exl_format::{ConfigFile, FileNames, Split};

use super::Arch;
use super::decoder::Decoder;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "index",
    names: &["IndexForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    // A number in published files.
    let norm_head = Params(config).key(&["norm_head"]);
    let on = match norm_head.value() {
        Some(value) => value.as_bool().or(value.as_i64().map(|n| n != 0)),
        None => Some(true),
    };
    if on != Some(true) {
        let found = norm_head.value().map_or(String::new(), ToString::to_string);
        return Err(norm_head
            .error("1, as in all published models", found)
            .into());
    }
    Decoder::new("index", config, options)?.spec()
}

/// A quantized head was made from such rows already.
fn files(_: &Spec) -> FileNames {
    let mut head = Split::whole("lm_head", "lm_head");
    head.unit_rows = true;
    FileNames {
        splits: vec![head],
        ..FileNames::default()
    }
}
