//! Index: Llama with head rows of length one.

use exl_format::{ConfigFile, FileNames, Split};

use super::Arch;
use super::decoder::Decoder;
use crate::params::Params;
use crate::rope::RopeOptions;
use crate::{Error, Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "index",
    names: &["IndexForCausalLM"],
    parse,
    files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let norm_head = Params(config).key(&["norm_head"]);
    if !norm_head.flag()?.unwrap_or(true) {
        let error: exl_format::Error =
            norm_head.error("true, as all published models have it", "false");
        return Err(Error::from(error));
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
