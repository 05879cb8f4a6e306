//! EXAONE 4: norms over the heads of q and k, and only on what is added; where there are sliding
//! layers, the others rotate nothing.

use exl_format::ConfigFile;
use serde_json::json;

use super::decoder::Decoder;
use super::sizes::{sliding, window, windows};
use super::{Arch, plain_files};
use crate::params::{MAX_LAYERS, Params};
use crate::rope::RopeOptions;
use crate::spec::HeadNormOver;
use crate::{Result, Spec};

pub(super) const ARCH: Arch = Arch {
    family: "exaone4",
    names: &["Exaone4ForCausalLM"],
    parse,
    files: plain_files,
};

fn parse(config: &ConfigFile, options: &RopeOptions) -> Result<Spec> {
    let config = config.with_defaults(&json!({"rms_norm_eps": 1e-5}));
    let p = Params(&config);
    let mut d = Decoder::new("exaone4", &config, options)?;
    d.head_norm = Some((d.norm, HeadNormOver::Head));
    (d.names.attn_norm, d.names.mlp_norm) = (None, None);
    d = d.with_post_norms("post_attention_layernorm", "post_feedforward_layernorm");
    let window = window(p)?;
    if window > 0 {
        let slides = sliding(p, pattern(p, d.sizes.layers)?)?;
        d.windows = windows(&slides, window);
        d.layer_ropes = slides.iter().map(|&s| s.then_some(0)).collect();
    }
    d.spec()
}

/// Which layers slide: a number of layers up to the global one, or a text such as `LLLG`. The last
/// layer never does.
fn pattern(p: Params<'_>, layers: usize) -> Result<impl Fn(usize) -> bool> {
    let lookup = p.key(&["sliding_window_pattern"]);
    let kinds: Vec<bool> = match lookup.value().and_then(|v| v.as_str()) {
        Some(text) if !text.is_empty() => text.chars().map(|c| c == 'L').collect(),
        Some(_) => return Err(lookup.error("letters L and G", "none").into()),
        None => {
            let every = p
                .positive(&["sliding_window_pattern"], MAX_LAYERS)?
                .unwrap_or(4);
            (0..every).map(|i| i + 1 < every).collect()
        }
    };
    Ok(move |i: usize| kinds[i % kinds.len()] && i + 1 < layers)
}
