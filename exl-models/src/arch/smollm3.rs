//! SmolLM3: Llama in which some layers rotate nothing.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::sizes::{sliding, window, windows};
use super::{Arch, plain_files};
use crate::params::{MAX_LAYERS, Params};
use crate::rope::RopeOptions;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "smollm3",
    names: &["SmolLM3ForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({
        "tie_word_embeddings": true, "rope_theta": 2e6, "rms_norm_eps": 1e-6,
    }));
    let p = Params(&config);
    let mut d = Decoder::new("smollm3", &config, options)?;
    let count = d.sizes.layers;
    let lookup = p.key(&["no_rope_layers"]);
    // The list says which layers do rotate.
    let rotates: Vec<bool> = match lookup.integers()? {
        Some(list) if list.len() != count => {
            let found = list.len().to_string();
            return Err(lookup.error(format!("{count} entries"), found).into());
        }
        Some(list) => list.iter().map(|&r| r != 0).collect(),
        None => {
            let every = p
                .positive(&["no_rope_layer_interval"], MAX_LAYERS)?
                .unwrap_or(4);
            (0..count)
                .map(|i: usize| !(i + 1).is_multiple_of(every))
                .collect()
        }
    };
    if p.flag("use_sliding_window")? {
        d.windows = windows(&sliding(p, |i| !rotates[i])?, window(p)?);
    }
    d.layer_ropes = rotates.iter().map(|&r| r.then_some(0)).collect();
    d.spec()
}
